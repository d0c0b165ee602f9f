"""The overhead benchmark's work as our job, from the start of `run_job` to its report: exactly what a user gets."""

import shutil
import sys
from collections import defaultdict
from pathlib import Path

from benchmarks.overhead.input import Input
from benchmarks.overhead.notes import Note, Scored, Trained, note
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current

JOB = "fedavg"


def run(given: Input, model: Path) -> None:
    """Run the job as if it had never run before; `model` becomes a link to its checkpoint."""
    store = Store(given.home)
    for old in (store.flare(JOB), store.checkpoint(JOB)):
        shutil.rmtree(old, ignore_errors=True)
    *events, report = run_job(
        current(store.job_folder(JOB)),
        store.flare(JOB),
        split_file(current(store.combined), "testing"),
        store.checkpoint(JOB),
    )
    assert isinstance(report, JobReport), "run_job ends with a report or raises"
    model.symlink_to(store.checkpoint(JOB) / MODEL_FILE)
    for one in notes([event for event in events if isinstance(event, Point)]):
        note(one)


def notes(points: list[Point]) -> list[Note]:
    """What the sites' points say of their work: a round's training begins when its received model has been scored."""
    scored = {(point.site, point.round): point for point in points if point.name == "val_loss" and point.site}
    steps: defaultdict[tuple[str, int], list[Point]] = defaultdict(list)
    for point in points:
        if point.name == "train_loss" and point.site and point.step:
            steps[point.site, point.round - 1].append(point)
    return [
        *(Scored(site, round, point.value, point.tokens or 0) for (site, round), point in scored.items() if site),
        *(
            Trained(
                site,
                round,
                len(done),
                sum(point.tokens or 0 for point in done),
                scored[site, round].time,
                max(point.time for point in done),
            )
            for (site, round), done in steps.items()
        ),
    ]


if __name__ == "__main__":
    run(Input(Path(sys.argv[1])), Path(sys.argv[2]))
