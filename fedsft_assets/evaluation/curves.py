"""The validation loss of jobs over what they have spent, as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.files import publish_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOCAL_COLORS = ("#7a9cc6", "#8fb996", "#c9a66b", "#b48ead", "#94a3b8")
_CENTRALIZED_COLOR = "#334155"
_FEDERATED_COLORS = ("#c2410c", "#7c3aed", "#0f766e")


XAxis = Literal["records", "bytes", "seconds"]
X_LABELS: dict[XAxis, str] = {
    "records": "records trained on, all sites together",
    "bytes": "MB sent by sites and to them, all sites together",
    "seconds": "seconds since the start of the job",
}


def plot(reports: Sequence[JobReport], path: Path, over: XAxis = "records") -> None:
    """Draw the curves of all jobs as a PNG; those over one validation split together, a panel for each split.

    The seeds of a job have one color, and the legend has the best loss of the first.

    `over` is what is on the x axis. A job of which it is unknown, as an earlier version of this package trained it, is
    named in the legend and has no curve.
    """
    from matplotlib.figure import Figure

    splits = list(dict.fromkeys(report.validation_digest for report in reports))
    figure = Figure(figsize=(9, 5 * len(splits)), dpi=140, layout="constrained")
    panels = figure.subplots(len(splits), squeeze=False)[:, 0]
    for split, axes in zip(splits, panels, strict=True):
        _draw([report for report in reports if report.validation_digest == split], axes, over)
        if len(splits) > 1:
            axes.set_title(f"validation split {split[:12]}", loc="right", fontsize=9, color="#6b7280")
    panels[0].set_title("Validation loss of every job from the same base model", loc="left", fontweight="bold")
    panels[-1].set_xlabel(X_LABELS[over])
    with publish_file(path) as fresh:
        figure.savefig(fresh, format="png")


def _draw(reports: Sequence[JobReport], axes: Axes, over: XAxis) -> None:
    """The curves of jobs over one validation split."""
    colors = iter(_LOCAL_COLORS * len(reports)), iter(_FEDERATED_COLORS * len(reports))
    styles: dict[str, dict[str, Any]] = {}
    for report in reports:
        label: str | None = None
        if report.job not in styles:
            label = f"{report.job} ({report.kind}): best {report.best_val_loss:.3f}"
            styles[report.job] = _style(report.kind, *colors)
        costs = spent(report, over)
        if costs is None:
            axes.plot([], [], label=label and f"{label}, {over} unknown", **styles[report.job])
        else:
            axes.plot(costs, report.val_loss, markersize=5, label=label, **styles[report.job])
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
    axes.set_ylabel("loss on the combined validation split\n(nats per answer token)")
    losses = [loss for report in reports for loss in report.val_loss]
    if min(losses) < max(losses) / 2:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _style(kind: str, local: Iterator[str], federated: Iterator[str]) -> dict[str, Any]:
    """How the curve of a job of this kind is drawn."""
    if kind == "local":
        return {"color": next(local), "linewidth": 1.6, "linestyle": (0, (5, 2)), "marker": "o"}
    if kind == "centralized":
        return {"color": _CENTRALIZED_COLOR, "linewidth": 2.0, "marker": "s"}
    return {"color": next(federated), "linewidth": 2.8, "marker": "D"}


def spent(report: JobReport, over: XAxis) -> Sequence[float] | None:
    """What the job had spent when each of its losses was known, or None if that is unknown."""
    match over:
        case "records":
            return report.samples
        case "seconds":
            return report.elapsed
    return [size / 1e6 for size in report.transferred] if report.transferred is not None else None
