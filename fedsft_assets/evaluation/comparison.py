"""A table and a plot comparing all jobs of a study."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from tabulate import tabulate

from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.files import publish_file
from fedsft_assets.specs.job import JobKind

_HEADERS = (
    "job",
    "kind",
    "rounds",
    "tokens trained",
    "val loss, last round",
    "val loss, best",
    "best round",
    "test loss",
    "perplexity",
    "seconds",
)
_LOCAL_COLORS = ("#7a9cc6", "#8fb996", "#c9a66b", "#b48ead", "#94a3b8")
_CENTRALIZED_COLOR = "#334155"
_FEDERATED_COLORS = ("#c2410c", "#7c3aed", "#0f766e")


class NotComparableError(ValueError):
    """The jobs cannot be compared: different base models or validation data."""


@dataclass(frozen=True)
class Comparison:
    """The jobs in the order of the table: local, centralized, federated."""

    base_test_loss: float
    reports: list[JobReport]

    def markdown(self) -> str:
        """The table in Markdown, readable in a terminal too."""
        align = ("left", "left", *["right"] * (len(_HEADERS) - 2))
        return tabulate(self._rows(), headers=_HEADERS, tablefmt="pipe", disable_numparse=True, colalign=align)

    def _rows(self) -> list[tuple[str, ...]]:
        start = self.reports[0].base_val_loss
        base = ("base model", "", "", "", f"{start:.4f}", f"{start:.4f}", "", *_scores(self.base_test_loss), "")
        return [base, *(_row(report) for report in self.reports)]


def compare(reports: Sequence[JobReport], base_test_loss: float) -> Comparison:
    """Raises NotComparableError if the jobs started from different models or were scored on different records."""
    for field, meaning in (("base_model_digest", "base model"), ("validation_digest", "validation split")):
        values = {report.job: getattr(report, field) for report in reports}
        if len(set(values.values())) > 1:
            digests = ", ".join(f"{job}: {value[:12]}" for job, value in values.items())
            raise NotComparableError(
                f"the jobs have more than one {meaning} ({digests}); materialize their checkpoints again"
            )
    return Comparison(base_test_loss, sorted(reports, key=lambda report: sort_key(report.kind, report.job)))


def sort_key(kind: str, job: str) -> tuple[int, str]:
    """Sort key of jobs in tables and plots: local, centralized, federated, then by name."""
    return get_args(JobKind).index(kind), job


def write_table(comparison: Comparison, path: Path) -> None:
    """Write the table as a Markdown file."""
    with publish_file(path) as fresh:
        fresh.write_text(comparison.markdown() + "\n", encoding="utf-8")


def plot(reports: Sequence[JobReport], path: Path) -> None:
    """Plot the validation loss of all jobs over the records trained on, as a PNG."""
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


def _row(report: JobReport) -> tuple[str, ...]:
    return (
        report.job,
        report.kind,
        str(report.rounds),
        f"{report.tokens:,}",
        f"{report.last_val_loss:.4f}",
        f"{report.best_val_loss:.4f}",
        str(report.best_round),
        *_scores(report.test_loss),
        f"{report.seconds:.0f}",
    )


def _scores(loss: float) -> tuple[str, str]:
    return f"{loss:.4f}", f"{math.exp(loss):.3f}"
