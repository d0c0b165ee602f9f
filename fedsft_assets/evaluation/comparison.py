"""The comparison of all jobs of a study: verdicts and tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, cast, get_args

from fedsft_assets.evaluation.budgets import budget_cells, differing_budgets, traffic_cells
from fedsft_assets.evaluation.markdown import markdown_table
from fedsft_assets.evaluation.matrix import loss_matrix
from fedsft_assets.evaluation.record_scores import Evaluation, common_records, read_losses
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.model.perplexity import perplexity
from fedsft_assets.specs.job import BASE_MODEL, JobKind

if TYPE_CHECKING:
    import pandas as pd

    from fedsft_assets.evaluation.statistics.intervals import Estimate
    from fedsft_assets.evaluation.statistics.prompt_losses import PromptLosses
    from fedsft_assets.evaluation.statistics.verdicts import Verdict

_DEVIATION = "deviation over seeds"
_HEADERS = (
    "job",
    "kind",
    "rounds",
    "tokens trained",
    "val loss, best",
    "best round",
    "test loss",
    "95 % interval",
    _DEVIATION,
    "perplexity",
    "seconds",
)

SHOWN_BASE_MODEL = "the base model"


class NotComparableError(ValueError):
    """The jobs cannot be compared: different base models or validation data."""


@dataclass(frozen=True)
class Comparison:
    """The jobs in the order of the table: local, centralized, federated.

    `runs` has the reports of each job, one for each seed, `reports` those of the first seed.
    `matrix` has the test loss of each model, the base model among them, on each dataset (see `loss_matrix`),
    `scores` that on all of them with its interval, `verdicts` who is better than whom, by names as they are shown.
    `losses` are those of each record that all models were scored on (see `record_scores`).
    """

    matrix: pd.DataFrame
    reports: list[JobReport]
    scores: dict[str, Estimate]
    verdicts: list[Verdict]
    losses: pd.DataFrame
    runs: dict[str, list[JobReport]]

    def markdown(self) -> str:
        """The verdicts and tables in Markdown, readable in a terminal too."""
        said = "\n".join(f"- {sentence}." for sentence in self.sentences)
        headers = [header for header in _HEADERS if header != _DEVIATION or self._has_seeds]
        jobs = markdown_table(headers, self._rows(), texts=2)
        return "\n\n".join([*([said] if said else []), jobs, *self.notes(), self._matrix_markdown(), *self._costs()])

    @property
    def sentences(self) -> list[str]:
        """The verdicts, and where budgets differ, in words."""
        return [verdict.sentence for verdict in self.verdicts] + self._budgets()

    def _budgets(self) -> list[str]:
        from fedsft_assets.evaluation.statistics.verdicts import BUDGET_TOLERANCE, unequal_budgets

        tokens = {job: round(mean(report.tokens for report in seeds)) for job, seeds in self.runs.items()}
        local = {report.job for report in self.reports if report.kind == "local"}
        pairs = [(verdict.job, verdict.other) for verdict in self.verdicts]
        said = unequal_budgets(tokens, [(job, other) for job, other in pairs if other not in local])
        if federated := {job for job, other in pairs if other in local}:
            most, fewest = (f(tokens[job] for job in local) for f in (max, min))
            theirs = " and ".join(f"{tokens[job]:,} of {job}" for job in sorted(federated))
            said.append(
                f"a local job trains on its site's data alone: {fewest:,} to {most:,} answer tokens beside {theirs}"
            )
        return said + differing_budgets(self.reports, BUDGET_TOLERANCE)

    def notes(self) -> Iterator[str]:
        """What to mind where jobs have several seeds, or were trained beside different validation splits."""
        if self._has_seeds:
            seeds = sorted(
                {report.seed for reports in self.runs.values() for report in reports if report.seed is not None}
            )
            yield (
                f"Every job was trained with the seeds {', '.join(map(str, seeds))}; values are means over them. The"
                " interval has both sources of variance, the records and the seeds; the deviation is that of the test"
                " loss over seeds."
            )
        splits = {report.validation_digest for reports in self.runs.values() for report in reports}
        if len(splits) > 1:
            yield (
                f"Validation losses are over {len(splits)} validation splits, as data has changed between the jobs:"
                " compare by test loss, for which all models were scored on the same records."
            )

    def _costs(self) -> Iterator[str]:
        yield "What each job cost, with the first seed:" if self._has_seeds else "What each job cost:"
        yield markdown_table(*budget_cells(self.reports), texts=1)
        if any(report.traffic for report in self.reports):
            yield markdown_table(*traffic_cells(self.reports), texts=2)

    def _rows(self) -> list[tuple[str, ...]]:
        starts = {f"{report.base_val_loss:.4f}" for report in self.reports}
        start = starts.pop() if len(starts) == 1 else ""
        base = (shown(BASE_MODEL), "", "", "", start, "", *self._scores(SHOWN_BASE_MODEL), "")
        return [base, *(self._row(seeds) for seeds in self.runs.values())]

    def _row(self, seeds: Sequence[JobReport]) -> tuple[str, ...]:
        """One job, trained with these seeds."""
        return (
            seeds[0].job,
            seeds[0].kind,
            str(seeds[0].rounds),
            f"{mean(report.tokens for report in seeds):,.0f}",
            f"{mean(report.best_val_loss for report in seeds):.4f}",
            ", ".join(str(report.best_round) for report in seeds),
            *self._scores(seeds[0].job),
            f"{mean(report.seconds for report in seeds):.0f}",
        )

    def _scores(self, model: str) -> tuple[str, ...]:
        found = self.scores[model]
        known = math.isfinite(found.high - found.low)
        interval = f"{found.low:.4f} to {found.high:.4f}" if known else "unknown"
        deviation = "" if found.deviation is None else f"{found.deviation:.4f}"
        over_seeds = (deviation,) if self._has_seeds else ()
        return f"{found.value:.4f}", interval, *over_seeds, f"{perplexity(found.value):.3f}"

    @property
    def _has_seeds(self) -> bool:
        return any(len(seeds) > 1 for seeds in self.runs.values())

    def _matrix_markdown(self) -> str:
        rows = [(shown(str(model)), *map("{:.4f}".format, losses)) for model, *losses in self.matrix.itertuples()]
        return markdown_table(("test loss on", *map(str, self.matrix.columns)), rows, texts=1)


def compare(reports: Sequence[JobReport], evaluations: Sequence[Path]) -> Comparison:
    """Put jobs side by side, from their reports and the folders of their evaluations and the base model's.

    Raises NotComparableError if the jobs started from different models or were scored on different records.
    """
    from fedsft_assets.evaluation.statistics.intervals import score_jobs
    from fedsft_assets.evaluation.statistics.score_table import by_prompt

    evaluated = [Evaluation.read(folder) for folder in evaluations]
    for seed in {report.seed for report in reports}:
        base_models = {report.job: report.base_model_digest for report in reports if report.seed == seed}
        _require_one(base_models, "the jobs have more than one base model", "checkpoints")
    splits = {one.model: one.testing_split for one in evaluated}
    _require_one(splits, "the models were evaluated on more than one testing split", "evaluations")
    _require_evaluations_of(reports, evaluated)
    ordered = sorted(reports, key=lambda report: (*sort_key(report.kind, report.job), report.seed or 0))
    losses = common_records(read_losses(evaluations))
    runs = {job: [report for report in ordered if report.job == job] for job in dict.fromkeys(r.job for r in ordered)}
    matrix = loss_matrix(losses).loc[[BASE_MODEL, *runs]]
    scores = by_prompt(as_scores(losses[losses["first"]]))
    reports = [seeds[0] for seeds in runs.values()]
    return Comparison(matrix, reports, score_jobs(scores), _verdicts(reports, scores), losses, runs)


def _require_evaluations_of(reports: Sequence[JobReport], evaluations: Sequence[Evaluation]) -> None:
    """Raise NotComparableError if an evaluation is not that of the checkpoint, or of the base model, of its seed."""
    known = {(report.job, report.seed): report.checkpoint_digest for report in reports}
    base_models = {report.seed: report.base_model_digest for report in reports}
    known |= {(BASE_MODEL, seed): digest for seed, digest in base_models.items()}
    known[BASE_MODEL, None] = reports[0].base_model_digest
    jobs = {job for job, _ in known}
    wrong = [
        one.model
        for one in evaluations
        # A report of an earlier version of this package has no seed.
        if one.model in jobs and one.archive_digest != known.get((one.model, one.seed), known.get((one.model, None)))
    ]
    if wrong:
        raise NotComparableError(
            f"the evaluations of {', '.join(wrong)} are of other checkpoints; materialize these evaluations again"
        )


def _require_one(digests: Mapping[str, str], otherwise: str, again: str) -> None:
    if len(set(digests.values())) > 1:
        said = ", ".join(f"{name}: {digest[:12]}" for name, digest in digests.items())
        raise NotComparableError(f"{otherwise} ({said}); materialize their {again} again")


def _verdicts(reports: Sequence[JobReport], scores: PromptLosses) -> list[Verdict]:
    """Each federated job against the others and the base model."""
    from fedsft_assets.evaluation.statistics.intervals import compare_pairs
    from fedsft_assets.evaluation.statistics.verdicts import judge, pairs_that_matter

    kinds = {report.job: cast("JobKind", report.kind) for report in reports}
    return judge(compare_pairs(scores, pairs_that_matter(kinds, SHOWN_BASE_MODEL)))


def as_scores(records: pd.DataFrame) -> pd.DataFrame:
    """Losses as the statistics take them."""
    return records.assign(job=records["model"].mask(records["model"] == BASE_MODEL, SHOWN_BASE_MODEL))


def shown(model: str) -> str:
    """A model's name in tables."""
    return "base model" if model == BASE_MODEL else model


def sort_key(kind: str, job: str) -> tuple[int, str]:
    """Sort key of jobs in tables and plots: local, centralized, federated, then by name."""
    return get_args(JobKind).index(kind), job
