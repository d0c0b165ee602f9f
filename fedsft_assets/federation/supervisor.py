"""The process that stands between Dagster and a running job.

It starts the job in its runtime, passes on what happens as events, writes the checkpoint at the end, and
leaves no process behind, whichever way it ends: also when it is told to stop, and when whoever started it
is gone.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from fedsft_assets.evaluation.losses import split_loss
from fedsft_assets.federation.events import Event, Failed, encode
from fedsft_assets.federation.job_folder import read_plans, read_spec
from fedsft_assets.federation.metrics import Point, parse_point
from fedsft_assets.federation.phases import longest_phases, round_to_ms
from fedsft_assets.federation.processes import MARK, stop_marked
from fedsft_assets.federation.report import MODEL_FILE, Curve, JobReport, global_curve
from fedsft_assets.federation.server import BEST_MODEL
from fedsft_assets.federation.simulator import Simulator
from fedsft_assets.federation.tail import Tail
from fedsft_assets.federation.trainer_log import Progress, TrainerFailure, read_line
from fedsft_assets.specs import JobSpec, SitePlan
from fedsft_assets.store import publish_folder

_POLL_SECONDS = 0.3
_TAIL_LINES = 40


class JobFailedError(RuntimeError):
    """The job ended without a result; the message is for the user."""


def supervise(job_folder: Path, workspace: Path, testing_file: Path, into: Path, threads: int) -> Iterator[Event]:
    """Run the job to its end and write its checkpoint and report into the folder `into`.

    `threads` is per trainer; 0 shares the cores among the trainers. Raises JobFailedError, also when the
    parent process ends.
    """
    spec = read_spec(job_folder)
    begun = time.monotonic()
    job = Simulator(job_folder, workspace, list(spec.sites))
    job.start(threads or max(1, (os.cpu_count() or 1) // len(spec.sites)))
    points: list[Point] = []
    for event in _follow(job):
        if isinstance(event, Point):
            points.append(event)
        yield event
    try:
        curve = global_curve(points, spec)
    except ValueError as error:
        raise JobFailedError(f"{error}\nThe end of {job.log_file}:\n{Tail(job.log_file).end(_TAIL_LINES)}") from error
    yield Progress("writing the checkpoint and scoring it on the combined testing split")
    plan, phases = read_plans(job_folder)[0], longest_phases(points)
    yield _finish(spec, plan, job.run_dir / BEST_MODEL, testing_file, into, curve, begun, phases)


def _follow(job: Simulator) -> Iterator[Event]:
    """Events of a running job until it has ended and all is read."""
    logs, metrics = {site: Tail(path) for site, path in job.site_logs.items()}, Tail(job.metrics_file)
    parent = os.getppid()
    while True:
        if os.getppid() != parent:
            raise JobFailedError("whoever started the job is gone")
        ended = job.poll() is not None
        for site, log in logs.items():
            for said in map(read_line, log.new_lines()):
                if isinstance(said, TrainerFailure):
                    raise JobFailedError(_explain(site, said, log))
                if said:
                    yield said
        yield from map(parse_point, metrics.new_lines())
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def _explain(site: str, failure: TrainerFailure, log: Tail) -> str:
    """What the user must see: the trainer's own traceback, or the end of its site's log."""
    rest = "" if failure.said_why else f"\nThe end of {log.path}:\n{log.end(_TAIL_LINES)}"
    return f"the trainer of {site} failed:\n{failure.reason}{rest}"


def _finish(
    spec: JobSpec,
    plan: SitePlan,
    weights: Path,
    testing_file: Path,
    into: Path,
    curve: Curve,
    begun: float,
    phases: dict[str, float],
) -> JobReport:
    saving = time.monotonic()
    import torch

    from fedsft_assets.model.archive import content_digest
    from fedsft_assets.model.language_model import LanguageModel

    model = LanguageModel.load(plan.base_model)
    trained = torch.load(weights, map_location="cpu", weights_only=True)
    with publish_folder(into) as folder:
        if plan.training.peft:
            from fedsft_assets.model.adapters import ADAPTER_FOLDER, add_adapters

            adapters = add_adapters(model, plan.training.peft, plan.seed)
            model.load_weights(trained)
            adapters.save(folder / ADAPTER_FOLDER)
            adapters.merge()
        else:
            model.load_weights(trained)
        model.save(folder / MODEL_FILE)
        test = split_loss(folder / MODEL_FILE, testing_file, plan)
        report = JobReport(
            job=spec.name,
            kind=spec.kind,
            rounds=spec.rounds,
            best_round=curve.best_round,
            tokens=curve.tokens,
            samples=curve.samples,
            val_loss=curve.val_loss,
            test_loss=test.loss,
            perplexity=test.perplexity,
            seconds=time.monotonic() - begun,
            phases={**phases, "save": round_to_ms(time.monotonic() - saving)},
            checkpoint_digest=content_digest(folder / MODEL_FILE),
            base_model_digest=content_digest(plan.base_model),
            validation_digest=plan.digests["validation_file"],
        )
        report.write(folder)
    return report


def _stop(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(128 + _signal)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one job and write its checkpoint.")
    for name in ("job-folder", "workspace", "testing-file", "into"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    # Standard output is for events alone; whatever libraries print goes where errors go.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    code = 1
    try:
        for event in supervise(args.job_folder, args.workspace, args.testing_file, args.into, args.threads):
            print(encode(event), file=events, flush=True)
        code = 0
    except JobFailedError as error:
        print(encode(Failed(str(error))), file=events, flush=True)
    finally:
        stop_marked(os.environ[MARK])
    sys.exit(code)


if __name__ == "__main__":
    main()
