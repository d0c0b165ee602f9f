"""MLflow's store in a home: made whole, or not at all, by whoever needs it first."""

import subprocess
import sys
import time
from pathlib import Path

from fedsft_assets.tracking import Tracking

_USE = """
import sys
from pathlib import Path
from fedsft_assets.tracking import Tracking
print("begins", flush=True)
print(Tracking(f"sqlite:///{sys.argv[1]}", Path(sys.argv[1]).parent / "artifacts").experiment_id())
"""


def _use(database: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", _USE, str(database)], stdout=subprocess.PIPE, text=True)


def test_processes_that_need_the_store_at_once_find_it_whole(tmp_path: Path) -> None:
    database = tmp_path / "home" / "mlflow.db"
    users = [_use(database) for _ in range(3)]
    said = [user.communicate()[0].split() for user in users]
    assert {user.returncode for user in users} == {0}
    assert len({experiment for _, experiment in said}) == 1


def test_a_process_that_is_killed_while_it_makes_the_store_leaves_none(tmp_path: Path) -> None:
    database = tmp_path / "home" / "mlflow.db"
    with _use(database) as maker:
        while not any(path.stat().st_size for path in database.parent.glob(".mlflow.db.new-*/mlflow.db")):
            time.sleep(0.002)
        maker.kill()
    assert not database.exists()
    tracking = Tracking(f"sqlite:///{database}", tmp_path / "artifacts")
    assert tracking.experiment_id() == tracking.experiment_id()
    assert {path.name for path in database.parent.iterdir()} == {"mlflow.db", ".mlflow.db.lock"}
