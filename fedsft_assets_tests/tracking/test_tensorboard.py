"""TensorBoard's event files, read with TensorBoard's own reader: all points of a job, each once, whatever happened."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.tracking.tensorboard import EventFiles
from fedsft_assets_tests.tracking.examples import SITES, finish, job_points, track, until, write

_ALL = {"scalars": 0}


def _read(folder: Path) -> list[tuple[str, str, int, float, str]]:
    """Folder, tag, step, wall time and value of everything in it, sorted, with repeats."""
    found = []
    begun, *others = [*folder.glob("*"), folder]  # nothing has begun yet if there is nothing
    assert others in ([], [folder])
    for place in {path.parent for path in begun.rglob("*tfevents*")}:
        events = EventAccumulator(str(place), size_guidance=_ALL).Reload()
        name = place.relative_to(begun).as_posix()
        for tag in events.Tags()["scalars"]:
            found += [(name, tag, e.step, e.wall_time, repr(np.float32(e.value))) for e in events.Scalars(tag)]
    return sorted(found)


def _expected(points: Iterable[Point]) -> list[tuple[str, str, int, float, str]]:
    return sorted((p.site or ".", p.name, p.samples, p.time, repr(np.float32(p.value))) for p in points)


def test_every_point_is_there_once_with_its_time_over_the_records_trained_on(tmp_path: Path) -> None:
    points = [*job_points(), Point("train_loss", float("nan"), 3, 200, None, 1, 5, time=1.7e9 + 0.25)]
    files = EventFiles(tmp_path / "fedavg")
    for point in [*points, *points]:
        files.add([point])
    assert _read(tmp_path / "fedavg") == _expected(points)  # while the job still runs
    files.close()
    assert _read(tmp_path / "fedavg") == _expected(points)
    assert {path.name for path in (tmp_path / "fedavg").glob("*/*") if path.is_dir()} == set(SITES)


def test_files_begin_anew_with_what_was_there_before(tmp_path: Path) -> None:
    points = job_points()
    EventFiles(tmp_path).add(points[:20])  # and its process is killed
    half = next(tmp_path.rglob("*tfevents*"))
    half.write_bytes(half.read_bytes()[:-5])
    files = EventFiles(tmp_path, points[:15])
    files.add(points[15:])
    files.close()
    assert _read(tmp_path) == _expected(points)


def test_an_open_tensorboard_forgets_the_execution_before(tmp_path: Path) -> None:
    points = job_points()
    reader = EventMultiplexer(size_guidance=_ALL)
    for of_execution in (job_points(rounds=5), points):
        EventFiles(tmp_path / "fedavg", of_execution).close()
        reader.AddRunsFromDirectory(str(tmp_path))
        reader.Reload()
    (run,) = [run for run in reader.Runs() if not run.endswith(tuple(SITES))]
    assert run.startswith("fedavg/20")
    seen = [(e.step, e.wall_time) for e in reader.Scalars(run, "val_loss")]
    assert seen == [(p.samples, p.time) for p in points if p.name == "val_loss" and p.site is None]


def test_writing_needs_neither_torch_nor_tensorflow(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.tracking.tensorboard import EventFiles
EventFiles(Path(sys.argv[1]), [Point("val_loss", 1.0, 0, 0)]).close()
print({name.split(".")[0] for name in sys.modules} & {"torch", "tensorflow", "dagster", "mlflow"})
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert list(tmp_path.rglob("*tfevents*"))


@pytest.mark.parametrize("error", [None, RuntimeError("trainer died")])
def test_a_tracked_job_leaves_its_event_files(
    tracking: Tracking, store: Store, checkpoint: Path, error: Exception | None
) -> None:
    points = job_points()

    def run() -> None:
        with track(tracking, store) as job:
            write(store, points[:12])
            until(lambda: _read(store.tensorboard("fedavg")) == _expected(points[:12]), "points are there live")
            write(store, points[12:])
            if error:
                raise error
            finish(job, checkpoint)

    if error:
        with pytest.raises(type(error)):
            run()
    else:
        run()
    assert _read(store.tensorboard("fedavg")) == _expected(points)


def test_another_execution_of_the_job_that_goes_on_keeps_its_curves(tmp_path: Path) -> None:
    points = job_points()
    one = EventFiles(tmp_path, points[:4])
    EventFiles(tmp_path, points).close()
    one.add(points)
    one.close()
    assert len(list(tmp_path.iterdir())) == 2
    EventFiles(tmp_path).close()
    assert len(list(tmp_path.iterdir())) == 1
