"""One table and one plot over all jobs of a study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from tabulate import tabulate

from fedsft_assets.evaluation.matrix import loss_matrix
from fedsft_assets.evaluation.record_scores import Evaluation, common_records, read_losses
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.files import publish_file
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import BASE_MODEL, JobKind

if TYPE_CHECKING:
    import pandas as pd

_HEADERS = (
    "job",
    "kind",
    "rounds",
    "tokens trained",
    "val loss, best",
    "best round",
    "test loss",
    "perplexity",
    "seconds",
)
_LARGEST_EXPONENT = 700.0  # of a float64
_LOCAL_COLORS = ("#7a9cc6", "#8fb996", "#c9a66b", "#b48ead", "#94a3b8")
_CENTRALIZED_COLOR = "#334155"
_FEDERATED_COLORS = ("#c2410c", "#7c3aed", "#0f766e")


class NotComparableError(ValueError):
    """The jobs do not answer the same question."""


@dataclass(frozen=True)
class Comparison:
    """The jobs in the order of the table: local, centralized, federated.

    `matrix` has the test loss of each model, the base model among them, on each dataset (see `loss_matrix`).
    """

    matrix: pd.DataFrame
    reports: list[JobReport]

    def markdown(self) -> str:
        """For a page, and readable in a terminal."""
        return f"{_table(_HEADERS, self._rows(), texts=2)}\n\n{self._matrix_markdown()}"

    def _rows(self) -> list[tuple[str, ...]]:
        start = self.reports[0].base_val_loss
        base = ("base model", "", "", "", f"{start:.4f}", "", *self._scores(BASE_MODEL), "")
        return [base, *(self._row(report) for report in self.reports)]

    def _row(self, report: JobReport) -> tuple[str, ...]:
        return (
            report.job,
            report.kind,
            str(report.rounds),
            f"{report.tokens:,}",
            f"{report.best_val_loss:.4f}",
            str(report.best_round),
            *self._scores(report.job),
            f"{report.seconds:.0f}",
        )

    def _scores(self, model: str) -> tuple[str, str]:
        loss = float(self.matrix[COMBINED].loc[model])
        return f"{loss:.4f}", f"{perplexity(loss):.3f}"

    def _matrix_markdown(self) -> str:
        rows = [
            ("base model" if model == BASE_MODEL else str(model), *map("{:.4f}".format, losses))
            for model, *losses in self.matrix.itertuples()
        ]
        return _table(("test loss on", *map(str, self.matrix.columns)), rows, texts=1)


def compare(reports: Sequence[JobReport], evaluations: Sequence[Path]) -> Comparison:
    """Put jobs side by side, from their reports and the folders of their evaluations and the base model's.

    Raises NotComparableError if the jobs started from different models or were scored on different records.
    """
    for field, meaning in (("base_model_digest", "base model"), ("validation_digest", "validation split")):
        values = {report.job: getattr(report, field) for report in reports}
        if len(set(values.values())) > 1:
            said = ", ".join(f"{job}: {value[:12]}" for job, value in values.items())
            raise NotComparableError(
                f"the jobs have more than one {meaning} ({said}); materialize their checkpoints again"
            )
    splits = {(read := Evaluation.read(folder)).model: read.testing_split for folder in evaluations}
    if len(set(splits.values())) > 1:
        said = ", ".join(f"{model}: {digest[:12]}" for model, digest in splits.items())
        raise NotComparableError(
            f"the models were evaluated on more than one testing split ({said}); materialize their evaluations again"
        )
    ordered = sorted(reports, key=lambda report: sort_key(report.kind, report.job))
    matrix = loss_matrix(common_records(read_losses(evaluations)))
    return Comparison(matrix.loc[[BASE_MODEL, *(report.job for report in ordered)]], ordered)


def sort_key(kind: str, job: str) -> tuple[int, str]:
    """What jobs are sorted by wherever they stand side by side: local, centralized, federated, then their names."""
    return get_args(JobKind).index(kind), job


def write_table(comparison: Comparison, path: Path) -> None:
    """Write the table as a Markdown file."""
    with publish_file(path) as fresh:
        fresh.write_text(comparison.markdown() + "\n", encoding="utf-8")


def plot(reports: Sequence[JobReport], path: Path) -> None:
    """Draw the validation loss of all jobs over the records that they trained on, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=140, layout="constrained")
    axes = figure.subplots()
    local_colors, federated_colors = iter(_LOCAL_COLORS * 9), iter(_FEDERATED_COLORS * 9)
    for report in reports:
        style: dict[str, Any]
        if report.kind == "local":
            style = {"color": next(local_colors), "linewidth": 1.6, "linestyle": (0, (5, 2)), "marker": "o"}
        elif report.kind == "centralized":
            style = {"color": _CENTRALIZED_COLOR, "linewidth": 2.0, "marker": "s"}
        else:
            style = {"color": next(federated_colors), "linewidth": 2.8, "marker": "D"}
        label = f"{report.job} ({report.kind}): best {report.best_val_loss:.3f}"
        axes.plot(report.samples, report.val_loss, markersize=5, label=label, **style)
    axes.axhline(reports[0].base_val_loss, color="#9ca3af", linewidth=1, linestyle=":")
    axes.annotate(
        "base model",
        (1, reports[0].base_val_loss),
        xycoords=("axes fraction", "data"),
        xytext=(-4, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#6b7280",
        fontsize=9,
    )
    axes.set_xlabel("records trained on, all sites together")
    axes.set_ylabel("loss on the combined validation split\n(nats per answer token)")
    axes.set_title("Validation loss of every job from the same base model", loc="left", fontweight="bold")
    losses = [loss for report in reports for loss in report.val_loss]
    if min(losses) < max(losses) / 2:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with publish_file(path) as fresh:
        figure.savefig(fresh, format="png")


def perplexity(loss: float) -> float:
    """e to the loss; infinite where that is no number."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """A Markdown table; the first `texts` columns are texts, the others numbers."""
    align = (*["left"] * texts, *["right"] * (len(headers) - texts))
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)
