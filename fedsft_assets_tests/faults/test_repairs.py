"""What was frozen goes on when its time has come, and not before."""

import os
import subprocess
from pathlib import Path

import psutil

from fedsft_assets.store import Store
from fedsft_assets_tests.faults.repairs import Repairs
from fedsft_assets_tests.faults.systems import SimulatorSystem


def test_a_frozen_process_goes_on_when_it_is_due_or_when_all_is_to_be_repaired(tmp_path: Path) -> None:
    repairs = Repairs(SimulatorSystem(Store(tmp_path)))
    with subprocess.Popen(["sleep", "600"]) as sleeping:
        try:
            process = psutil.Process(sleeping.pid)
            for seconds, all_at_once in ((0.0, False), (600.0, True)):
                process.suspend()
                assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
                repairs.thaw([process], seconds)
                if all_at_once:
                    repairs.run()
                    assert process.status() == psutil.STATUS_STOPPED
                assert repairs.is_open
                repairs.run(all_at_once=all_at_once)
                assert os.WIFCONTINUED(os.waitpid(process.pid, os.WCONTINUED)[1])
                assert not repairs.is_open
        finally:
            sleeping.kill()
