"""What a user sees of NeMo's import when checkpoints are checked: nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from fedsft_assets.model.base_model import create_base_model
from fedsft_assets_tests.prepared import TINY

_CHECK = "import sys; from pathlib import Path; from fedsft_assets.model.nemo_agreement import agreement"


@pytest.mark.slow
def test_nemos_telemetry_says_nothing(tmp_path: Path) -> None:
    create_base_model(TINY, tmp_path / "tiny.nemo", seed=1, texts=["question and answer"])
    command = f"{_CHECK}; print(agreement(Path(sys.argv[1])).agrees)"
    done = subprocess.run(
        [sys.executable, "-c", command, str(tmp_path / "tiny.nemo")], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "True"
    assert "OneLogger" not in done.stderr
    assert "exporters" not in done.stderr
