"""The command `fedsft tasks`: what a checkpoint scores in benchmark tasks, printed, in a file and in MLflow."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsft_assets.cli.generate import find_archive
from fedsft_assets.credentials import redact
from fedsft_assets.evaluation.task_data import PUBLISHED_TASKS
from fedsft_assets.model.errors import ModelError
from fedsft_assets.settings import Settings
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.tracking import EXPERIMENT, Tracking

if TYPE_CHECKING:
    from fedsft_assets.evaluation.tasks import TaskResult


def add_commands(commands: Any) -> None:
    """Add it to the subcommands of `fedsft`."""
    score = commands.add_parser("tasks", help="score a checkpoint in benchmark tasks of lm-eval")
    score.add_argument("--checkpoint", required=True, help="a .nemo archive, the name of a job, or 'base_model'")
    score.add_argument(
        "--tasks", default=",".join(PUBLISHED_TASKS), help="names of the harness, with commas between (%(default)s)"
    )
    score.add_argument(
        "--data",
        dest="questions",  # of a study, `data` is a setting
        type=Path,
        metavar="DIR",
        help="a folder with one folder of questions for each task; without it, they are downloaded from the hub",
    )
    score.add_argument("--limit", type=int, help="ask only so many questions of each task")
    score.add_argument("--batch-size", type=int, default=16, help="answers scored at once (%(default)s)")
    score.add_argument("--into", type=Path, metavar="DIR", help="where to write tasks.json")


def run(args: argparse.Namespace, settings: Settings) -> None:
    from fedsft_assets.evaluation.tasks import TaskReport, TasksError, score_tasks, task_table
    from fedsft_assets.model.archive.nemo_archive import content_digest

    for name, number in (("limit", args.limit), ("batch-size", args.batch_size)):
        if number is not None and number < 1:
            sys.exit(f"--{name}: {number} is too few; the least is 1")
    tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
    try:
        archive = find_archive(args.checkpoint, settings.store, settings.model)
        cache = settings.home / "cache"
        scratch = cache if cache.is_dir() else None  # an archive is scored without a home, too
        results = score_tasks(archive, tasks, args.questions, args.limit, args.batch_size, scratch)
        digest = content_digest(archive)
        report = TaskReport(digest, tuple(results))
        if args.into:
            report.write(args.into)
        if settings.home.is_dir():
            report.add_to(settings.store.tasks(digest))
    except (TasksError, ModelError, SpecError, OSError) as error:
        sys.exit(str(error))
    print(task_table({args.checkpoint: results}))
    if args.into:
        print(f"results: {args.into / 'tasks.json'}")
    _log(results, digest, Tracking.of(settings))


def _log(results: "list[TaskResult]", digest: str, tracking: Tracking) -> None:
    """Add the results to the latest MLflow run that ended with this checkpoint. Exits if MLflow does not take them."""
    from fedsft_assets.evaluation.tasks import log_results

    try:
        client = tracking.client()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        ids = [experiment.experiment_id] if experiment else []
        found = client.search_runs(ids, f"tags.`checkpoint.digest` = '{digest}'", max_results=1) if ids else []
        if not found:
            print(f"MLflow: no run in {tracking.uri} ended with this checkpoint, so none has the results")
            return
        log_results(results, client, found[0].info.run_id)
    except Exception as error:  # whatever MLflow says
        sys.exit(f"MLflow: has not taken the results: {redact(str(error))}")
    print(f"MLflow: run {found[0].info.run_name}, {found[0].info.run_id}")
