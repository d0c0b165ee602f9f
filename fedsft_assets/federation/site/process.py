"""The trainer process that NVFlare starts at a site: receives models from the server and returns results.

Requires NVFlare and `fedsft_assets.model`, but not Dagster or MLflow. The site's instructions are in one file of the
job folder, `plan.json`.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from fedsft_assets.federation.protocol.messages import other_version
from fedsft_assets.federation.protocol.meter import Meter
from fedsft_assets.federation.protocol.phases import JOB_STARTED, PhaseClock
from fedsft_assets.federation.protocol.state_folder import site_state_folder
from fedsft_assets.federation.site.cpu_slots import turn
from fedsft_assets.federation.site.failure_log import FAILURE_MARK
from fedsft_assets.federation.site.files import with_own_files
from fedsft_assets.federation.site.ranks import Followers, Task, start_all
from fedsft_assets.federation.site.reporter import Reporter, send_through_site
from fedsft_assets.specs.plan import SitePlan

if TYPE_CHECKING:
    from fedsft_assets.federation.site.trainer import SiteTrainer

# When one of several ranks dies, the others fail too. Torchrun ends them within this time, so that only the first
# failure is reported.
_SECONDS_TO_BE_ENDED = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description="Train at one site of a job.")
    parser.add_argument("--plan", type=Path, required=True, help="the site's plan.json")
    try:
        _work(SitePlan.model_validate_json(parser.parse_args().plan.read_text(encoding="utf-8")))
    except Exception as error:
        reason = traceback.format_exc()
        if _is_end_of_job(error):  # not a failure of this trainer: the job may be retried
            sys.exit(f"NVFlare has ended the job: {error}")
        if "RANK" in os.environ:
            time.sleep(_SECONDS_TO_BE_ENDED)
        print(f"{FAILURE_MARK}{json.dumps(reason)}", flush=True)
        _give_up(reason)
        sys.exit(1)


def _work(plan: SitePlan) -> None:
    if plan.training.devices > 1:
        start_all(plan.training.devices, Path.cwd())
    clock = started_clock()
    with clock.phase("import"):
        import nvflare.client as flare

        from fedsft_assets.federation.connections.local_driver import use_local_driver
        from fedsft_assets.federation.site.global_model import ExchangeError
        from fedsft_assets.federation.site.trainer import SiteTrainer
        from fedsft_assets.federation.transport import TensorEndpoint, tensor_streams
        from fedsft_assets.memory import keep_message_memory
    endpoint = TensorEndpoint()
    with tensor_streams(endpoint):
        if _leads():
            use_local_driver()
            keep_message_memory()
            flare.init()  # first: NVFlare waits for it, and loading a large model takes time
        if wrong := other_version(plan.package, "site"):
            raise ExchangeError(f"{plan.site}: {wrong}")
        with clock.phase("load"):
            plan = with_own_files(plan, os.environ)
        state = site_state_folder(Path.cwd().parent, plan.site)
        meter = Meter(state, f"rank-{_rank()}")
        reporter = Reporter(plan.site, send_through_site)
        trainer = SiteTrainer(plan, clock, reporter.report, state, meter)
        endpoint.deltas = trainer.exchange
        gc.freeze()  # what is loaded by now stays: collections need not look through it again
        followers = Followers() if plan.training.devices > 1 else None
        if trainer.devices.rank == 0:
            _lead(trainer, followers, reporter)
        elif followers:
            for task in followers.tasks():
                trainer.follow(task)
        if followers:
            followers.part()


def _lead(trainer: "SiteTrainer", followers: Followers | None, reporter: Reporter) -> None:
    """Execute NVFlare's tasks until the job ends, together with the site's other ranks if any."""
    import nvflare.client as flare

    while flare.is_running():
        with trainer.clock.phase("transfer"):
            received = flare.receive()
        if received is None:
            break
        evaluates = flare.is_evaluate()
        if followers:
            followers.tell(Task("evaluate" if evaluates else "train", received.current_round))
        with turn(lambda: reporter.report("waiting for a CPU slot", [])):
            result = trainer.evaluate(received) if evaluates else trainer.train(received)
        with trainer.clock.phase("transfer"):
            reporter.flush()  # the server checks a result against the points it has received
            flare.send(result)
    if followers:
        followers.tell(None)


def _is_end_of_job(error: Exception) -> bool:
    """Whether NVFlare ended the session for a reason outside this trainer."""
    from nvflare.client.cell.attach_session import TrainerSessionError

    return isinstance(error, TrainerSessionError)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _leads() -> bool:
    return _rank() == 0


def _give_up(why: str) -> None:
    """Report the failure to the server as the result of the current or next task."""
    if not _leads():
        return
    import nvflare.client as flare
    from nvflare.app_common.abstract.fl_model import FLModel

    from fedsft_assets.federation.protocol.messages import FAILURE_KEY

    try:
        flare.receive()
        flare.send(FLModel(metrics={}, meta={FAILURE_KEY: why}))
    except Exception:
        print(f"reporting the failure to the server failed:\n{traceback.format_exc()}", flush=True)


def started_clock() -> PhaseClock:
    """A clock that counts from the start of the job, if known, otherwise from the start of this process."""
    clock = PhaseClock()
    started = float(os.environ.get(JOB_STARTED) or psutil.Process().create_time())
    clock.add("start", max(0.0, time.time() - started))
    return clock


if __name__ == "__main__":
    main()
