"""What a checkpoint scores in benchmark tasks, by EleutherAI's harness, `lm-eval`: its prompts, metrics and errors.

The harness gets the checkpoint as a Hugging Face folder and knows nothing of this project, so that its numbers are
those that anybody gets who runs it by hand on an exported checkpoint. The extra `tasks` brings it.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedsft_assets.evaluation.comparison import NotComparableError
from fedsft_assets.evaluation.markdown import markdown_table
from fedsft_assets.evaluation.task_data import PUBLISHED_TASKS, TasksError, with_local_questions
from fedsft_assets.files import locked, publish_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

TASKS_FILE = "tasks.json"
BATCH_SIZE = 16
_NO_FILTER = "none"  # the harness's name for answers that are taken as they are
_NOT_IN_A_NAME = re.compile(r"[^\w.\- /]")  # of a metric in MLflow
_MLFLOW_BATCH = 1000  # metrics of one request

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task. `value` and `stderr` are the harness's, as fractions for accuracies.

    `metric` is its name for it, with the name of the filter behind a comma if answers were filtered. Scored were
    `samples` of the task's `questions`, the first ones, each after `fewshot` examples; `version` is the task's own.
    `scores` are the values of single questions, in the order of the data, where the metric has them.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    samples: int
    questions: int
    fewshot: int
    version: str
    harness: str
    higher_is_better: bool | None = None
    scores: tuple[float, ...] = field(default=(), repr=False)

    @property
    def asked(self) -> tuple[int, int, int, str, str]:
        """Equal for two results of one metric if the same was asked in the same way."""
        return self.samples, self.questions, self.fewshot, self.version, self.harness


@dataclass(frozen=True)
class TaskReport:
    """What one checkpoint, by the digest of its content, scores; it stands in a folder as `tasks.json`."""

    checkpoint_digest: str
    results: tuple[TaskResult, ...]

    @classmethod
    def read(cls, folder: Path) -> Self:
        said = json.loads((folder / TASKS_FILE).read_text(encoding="utf-8"))
        results = (TaskResult(**{**result, "scores": tuple(result["scores"])}) for result in said["results"])
        return cls(said["checkpoint_digest"], tuple(results))

    def write(self, folder: Path) -> None:
        with publish_file(folder / TASKS_FILE) as path:
            path.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def add_to(self, folder: Path) -> None:
        """Write the results among those that the folder has; a task's results replace its earlier ones."""
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            new = {result.task for result in self.results}
            earlier = type(self).read(folder).results if (folder / TASKS_FILE).exists() else ()
            kept = tuple(result for result in earlier if result.task not in new)
            replace(self, results=(*kept, *self.results)).write(folder)


def score_tasks(
    checkpoint: Path,
    tasks: Sequence[str] = PUBLISHED_TASKS,
    data: Path | None = None,
    limit: int | None = None,
    batch_size: int = BATCH_SIZE,
    scratch: Path | None = None,
) -> list[TaskResult]:
    """Score a `.nemo` archive in tasks, groups or tags of the harness, by name, `batch_size` answers at a time.

    Questions come from the hub, or from the folder `data` (see `with_local_questions`); `limit` is how many of each
    task are asked. The exported folder is in `scratch`, else where temporary files are, until the end. Code from the
    hub is never run. Raises TasksError for tasks that cannot be scored, and ModelError for the checkpoint.
    """
    if not tasks:
        raise TasksError("--tasks: names no task")
    if importlib.util.find_spec("lm_eval") is None:
        raise TasksError("lm_eval is not installed; pip install 'fedsft-assets[tasks]'")
    import evaluate.config

    evaluate.config.HF_EVALUATE_OFFLINE = True  # its metrics are programs on the hub
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from fedsft_assets.model.huggingface.export import export_huggingface
    from fedsft_assets.model.language_model import compute_device

    with tempfile.TemporaryDirectory(prefix="fedsft-tasks-", dir=scratch) as temporary, _harness_log():
        folder = Path(temporary)
        manager = TaskManager()
        loaded = _load(manager, tasks, data, folder / "data")
        export_huggingface(checkpoint, folder / "model")
        lm = HFLM(pretrained=str(folder / "model"), device=str(compute_device()), batch_size=batch_size)
        try:
            return _results(simple_evaluate(model=lm, tasks=loaded, task_manager=manager, limit=limit))
        except AssertionError as error:  # of the tokens of each question and answer
            raise TasksError(
                f"{checkpoint}: an answer has more tokens than the model's window of {lm.max_length}, or a question"
                " none; the harness cannot score that"
            ) from error


def _load(manager: Any, tasks: Sequence[str], data: Path | None, into: Path) -> list[Any]:
    """The harness's tasks and groups, with their questions."""
    unknown = [task for task in tasks if task not in manager.task_index]
    if unknown:
        raise TasksError("\n".join(_unknown(task, manager.all_tasks) for task in unknown))
    loaded: list[Any] = []
    for task, source in zip(tasks, _sources(manager, tasks, data, into) if data else tasks, strict=True):
        try:
            found = manager.load([str(source)])
        except Exception as error:  # of the hub, of a file's format, of the task's own code
            where = f"from {data}" if data else "from the hub; --data names a folder with them"
            raise TasksError(f"{task}: its questions cannot be loaded {where}: {_first_line(error)}") from error
        for one in found["tasks"].values():
            _require_own_metrics(one.config)
        # A group comes before the groups in it.
        loaded += list(found["groups"].values())[:1] or found["tasks"].values()
    return loaded


def _sources(manager: Any, tasks: Sequence[str], data: Path, into: Path) -> Iterator[Path]:
    for task in tasks:
        entry = manager.task_index[task]
        if task not in manager.all_subtasks or "dataset_path" not in (entry.cfg or {}):
            members = f" ({', '.join(sorted(entry.tags))})" if task in manager.all_tags else ""
            raise TasksError(f"{task}: is not a task with one dataset; with --data, name single tasks{members}")
        repository = str(entry.cfg["dataset_path"])
        yield with_local_questions(task, entry.yaml_path, repository, data, len(tasks) == 1, into)


def _unknown(task: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(task, known, n=5) or [name for name in known if task and task in name][:5]
    there_are = f"; the harness has {', '.join(nearest)}" if nearest else ""
    return f"--tasks: {task!r} is no task of the harness{there_are}"


def _require_own_metrics(config: Any) -> None:
    """A metric that the harness does not have itself was not loaded (see `score_tasks`)."""
    for metric in config.metric_list or []:
        if metric.get("hf_evaluate") and config.process_results is None:
            raise TasksError(
                f"{config.task}: its metric {metric['metric']!r} is a program on the hub, which is not run"
            )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class _TruncationCounter(logging.Filter):
    """Lets through errors alone, and counts the answers that did not fit behind their question."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += record.getMessage().startswith("Combined length of context")
        return record.levelno >= logging.ERROR


@contextmanager
def _harness_log() -> Iterator[None]:
    """Of what the harness says, errors are shown, and one line for all questions that lost their beginning."""
    logger, counter = logging.getLogger("lm_eval.models.huggingface"), _TruncationCounter()
    logger.addFilter(counter)
    try:
        yield
    finally:
        logger.removeFilter(counter)
    if counter.count:
        _log.warning(
            "%d questions with an answer are longer than the model's window; their beginning is cut", counter.count
        )


def _results(found: Mapping[str, Any]) -> list[TaskResult]:
    """The format: `lm_eval.result_schema`. Metrics are keyed `metric,filter`, their errors `metric_stderr,filter`."""
    from lm_eval import __version__

    results = []
    for task, values in found["results"].items():
        samples, questions = _counts(found, task)
        for key, value in values.items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{kept}")
            results.append(
                TaskResult(
                    task=task,
                    metric=metric if kept == _NO_FILTER else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                    samples=samples,
                    questions=questions,
                    fewshot=found["n-shot"].get(task, 0),
                    version=str(found["versions"].get(task, "")),
                    harness=f"lm-eval {__version__}",
                    higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                    scores=_scores(found["samples"].get(task, []), metric, kept),
                )
            )
    return results


def _counts(found: Mapping[str, Any], task: str) -> tuple[int, int]:
    """Questions that were asked, and all there are, of a task or of all tasks of a group."""
    if counts := found["n-samples"].get(task):
        return counts["effective"], counts["original"]
    members = [_counts(found, member) for member in found["group_subtasks"].get(task, ())]
    return sum(asked for asked, _ in members), sum(there for _, there in members)


def _scores(samples: Sequence[Mapping[str, Any]], metric: str, kept: str) -> tuple[float, ...]:
    values = [sample.get(metric) for sample in samples if sample["filter"] == kept]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return tuple(numbers) if len(numbers) == len(values) else ()


def task_table(models: Mapping[str, Sequence[TaskResult]]) -> str:
    """Results of models, by their names, side by side as Markdown: one row each, value ± standard error.

    Raises NotComparableError if they were not asked the same.
    """
    columns: dict[tuple[str, str], TaskResult] = {}
    for name, results in models.items():
        for result in results:
            first = columns.setdefault((result.task, result.metric), result)
            if first.asked != result.asked:
                raise NotComparableError(
                    f"{name}: {result.task} was asked {_how(result)}, of another model {_how(first)}; score them again"
                )
    rows = []
    for name, results in models.items():
        cells = {(result.task, result.metric): _cell(result) for result in results}
        rows.append((name, *(cells.get(column, "") for column in columns)))
    headers = ("model", *(f"{task} {metric}" for task, metric in columns))
    table = markdown_table(headers, rows, texts=1)
    asked = {task: f"{task} {_how(result)}" for (task, _), result in columns.items()}
    return f"{table}\n\n± standard error. {'; '.join(asked.values())}."


def _cell(result: TaskResult) -> str:
    return f"{result.value:.4f}" + (f" ± {result.stderr:.4f}" if result.stderr is not None else "")


def _how(result: TaskResult) -> str:
    """For example `50 of 1,838 questions, 0-shot (version 1.0, lm-eval 0.4.13)`."""
    some = f"{result.samples:,} of " if result.samples < result.questions else ""
    return f"{some}{result.questions:,} questions, {result.fewshot}-shot (version {result.version}, {result.harness})"


def log_results(results: Sequence[TaskResult], client: MlflowClient, run_id: str) -> None:
    """Add results to an MLflow run: `tasks/<task>/<metric>` with `_stderr`, and as a tag how each task was asked.

    Raises MlflowException if the tracking server does not take them.
    """
    from mlflow.entities import Metric, RunTag
    from mlflow.utils.time import get_current_time_millis

    now = get_current_time_millis()
    metrics = []
    for result in results:
        key = _NOT_IN_A_NAME.sub("_", f"tasks/{result.task}/{result.metric.replace(',', '/')}")
        values = {key: result.value, f"{key}_stderr": result.stderr}
        metrics += [Metric(name, value, now, 0) for name, value in values.items() if value is not None]
    tags = {_NOT_IN_A_NAME.sub("_", f"tasks/{result.task}"): _how(result) for result in results}
    client.log_batch(run_id, metrics[:_MLFLOW_BATCH], tags=[RunTag(name, said) for name, said in tags.items()])
    for start in range(_MLFLOW_BATCH, len(metrics), _MLFLOW_BATCH):
        client.log_batch(run_id, metrics[start : start + _MLFLOW_BATCH])
