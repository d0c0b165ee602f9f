"""The report of a study as one HTML file without any other: for who wants to know which model to use, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedsft_assets.evaluation.comparison import SHOWN_BASE_MODEL, shown
from fedsft_assets.evaluation.curves import X_LABELS
from fedsft_assets.evaluation.report.curve_chart import Chart, chart
from fedsft_assets.evaluation.report.heat_map import heat_map
from fedsft_assets.evaluation.report.site_gains import dataset_scores, gain_sentences
from fedsft_assets.evaluation.report.study import Study
from fedsft_assets.evaluation.report.study_facts import terms, trained_on
from fedsft_assets.evaluation.sample_answers import AnswerScores, how
from fedsft_assets.evaluation.tasks import TaskResult
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.files import publish_file
from fedsft_assets.model.perplexity import perplexity
from fedsft_assets.specs.job import BASE_MODEL

_TILES = {"local": "Best site alone", "centralized": "All data in one place", "federated": "Federated"}
_COSTS: dict[str, Callable[[JobReport], str | None]] = {
    "optimizer steps": lambda report: None if report.steps is None else f"{report.steps:,}",
    "CPU time": lambda report: None if report.cpu_seconds is None else readable_duration(report.cpu_seconds),
    "peak memory": lambda report: None if report.peak_memory is None else readable_size(report.peak_memory),
    "sites sent": lambda report: None if report.sent is None else readable_size(report.sent),
    "sites received": lambda report: None if report.received is None else readable_size(report.received),
}
_MOST_SENTENCES = 8  # more are folded away
_MOST_ROWS = 15  # of a table; longer ones scroll
_MOST_BESIDE = 8  # answers to one prompt that are shown at once


@dataclass(frozen=True)
class Tile:
    """The test loss of one model, among the few that a reader sees first."""

    model: str
    what: str
    loss: float
    chosen: bool


@dataclass(frozen=True)
class AnswerBlock:
    """A prompt with the answers to it, by model; `reference` is the record's own answer, if it is a record."""

    title: str
    prompt: str
    context: str
    reference: str | None
    answers: Mapping[str, str]
    scores: Mapping[str, str]


def write_report(study: Study, path: Path) -> None:
    """Write the report, atomically. It has neither scripts nor anything that a browser would load from elsewhere."""
    with publish_file(path) as fresh:
        fresh.write_text(render(study), encoding="utf-8")


def render(study: Study) -> str:
    """The page as HTML; all text of the study in it is escaped."""
    environment = Environment(
        loader=PackageLoader("fedsft_assets.evaluation.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "size": readable_size, "duration": readable_duration}
    return environment.get_template("report.html").render(**_content(study))


def _content(study: Study) -> dict[str, Any]:
    comparison = study.comparison
    scores = {
        dataset: {BASE_MODEL if model not in study.specs else model: found for model, found in of.items()}
        for dataset, of in dataset_scores(comparison).items()
    }
    jobs = [report.job for report in comparison.reports]
    return {
        "study": study,
        "chosen": study.recommendation,
        "terms": {job: terms(spec, study.data or ()) for job, spec in study.specs.items()},
        "data_of": {job: [one.name for one in trained_on(spec, study.data or ())] for job, spec in study.specs.items()},
        "records": scores["combined"][BASE_MODEL].records,
        "tiles": list(_tiles(study)),
        "sentences": comparison.sentences,
        "outcomes": _outcomes(study),
        "most_sentences": _MOST_SENTENCES,
        "most_rows": _MOST_ROWS,
        "datasets": list(scores),
        "rows": heat_map(list(_rows(study)), scores, jobs),
        "kinds": {report.job: report.kind for report in comparison.reports},
        "charts": list(_charts(comparison.reports)),
        "gain_sentences": gain_sentences(study.gains),
        "perplexity": {model: perplexity(found.value) for model, found in scores["combined"].items()},
        "costs": {name: show for name, show in _COSTS.items() if any(show(one) for one in comparison.reports)},
        "task_columns": _task_columns(study.tasks),
        "answer_scores": {model: AnswerScores.of(answers) for model, answers in study.samples.items()},
        "how": how(),
        "blocks": list(_blocks(study)),
        "first": _first(study),
        "not_run": list(study.not_run()),
    }


def _rows(study: Study) -> Iterator[str]:
    """The base model, the recommended one, then all others."""
    yield BASE_MODEL
    chosen = study.recommendation.job
    if chosen:
        yield chosen
    yield from (model for model in study.models if model not in (BASE_MODEL, chosen))


def _tiles(study: Study) -> Iterator[Tile]:
    """The base model, the best job of each kind, and the recommended one, in the order of the table."""
    scores, chosen = study.comparison.scores, study.recommendation.job
    yield Tile(BASE_MODEL, "Before training", scores[SHOWN_BASE_MODEL].value, chosen is None)
    for kind, what in _TILES.items():
        jobs = [report.job for report in study.comparison.reports if report.kind == kind]
        if jobs:
            best = chosen if chosen in jobs else min(jobs, key=lambda job: scores[job].value)
            yield Tile(best, what, scores[best].value, best == chosen)


def _outcomes(study: Study) -> dict[str, dict[str, int]]:
    """How many verdicts of each federated job have which outcome."""
    counts: dict[str, dict[str, int]] = {}
    for verdict in study.comparison.verdicts:
        of = counts.setdefault(verdict.job, {"better": 0, "worse": 0, "not decidable": 0})
        of[verdict.outcome] += 1
    return counts


def _charts(reports: Sequence[JobReport]) -> Iterator[tuple[str, list[tuple[Chart, Chart]]]]:
    """For each validation split its digest and pairs of charts: a wide one, and one for a phone.

    The first is over records, the others over what else is known.
    """
    for split in dict.fromkeys(report.validation_digest for report in reports):
        own = [report for report in reports if report.validation_digest == split]
        pairs = [(chart(own, 760, 380, True, over), chart(own, 350, 300, False, over)) for over in X_LABELS]
        yield split, [(large, small) for large, small in pairs if large and small]


def _task_columns(
    tasks: Mapping[str, Sequence[TaskResult]],
) -> dict[tuple[str, str], dict[str, TaskResult]]:
    """The results of each task and metric, by model."""
    columns: dict[tuple[str, str], dict[str, TaskResult]] = {}
    for model, results in tasks.items():
        for result in results:
            columns.setdefault((result.task, result.metric), {})[model] = result
    return columns


def _blocks(study: Study) -> Iterator[AnswerBlock]:
    """The example prompts, then the sample of test records."""
    if study.answers:
        for number, prompt in enumerate(study.answers.prompts):
            answers = {model: texts[number] for model, texts in study.answers.models.items()}
            yield AnswerBlock("Example prompt", prompt.question, prompt.context, None, answers, {})
    datasets = study.comparison.losses.groupby("record")["dataset"].agg(lambda names: ", ".join(sorted(set(names))))
    by_record: dict[str, dict[str, Any]] = {}
    for model, found in study.samples.items():
        for one in found:
            by_record.setdefault(one.record, {})[model] = one
    for record, by_model in by_record.items():
        one = next(iter(by_model.values()))
        yield AnswerBlock(
            title=f"Test record of {datasets.get(record, 'the testing split')}",
            prompt=one.prompt,
            context="",
            reference=one.reference,
            answers={shown(model): answer.answer for model, answer in by_model.items()},
            scores={
                shown(model): "exact" if answer.exact else f"ROUGE-L {answer.rouge_l:.2f}"
                for model, answer in by_model.items()
            },
        )


def _first(study: Study) -> set[str]:
    """The models whose answers are shown at once, by names as they are shown; others are folded away."""
    if len(study.models) <= _MOST_BESIDE:
        return {shown(model) for model in study.models}
    scores, chosen = study.comparison.scores, study.recommendation.job
    reports = sorted(study.comparison.reports, key=lambda report: scores[report.job].value)
    best = {report.kind: report.job for report in reversed(reports)}
    return {shown(BASE_MODEL), *best.values(), *([chosen] if chosen else [])}


def readable_size(count: float) -> str:
    """Bytes in the largest unit that leaves a number of 1 or more: `1.5 MB`."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def readable_duration(seconds: float) -> str:
    """For example `45 s`, `12 min` or `3.4 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
