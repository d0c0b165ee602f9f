"""The geometry of the validation-loss curves as an SVG picture: positions in pixels, which a template draws.

Colors are classes, so that the page's style decides on them, in light and in dark.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedsft_assets.evaluation.curves import X_LABELS, XAxis, spent
from fedsft_assets.federation.protocol.job_report import JobReport

MOST_NAMED = 9  # jobs; of more, only kinds can be told apart
_COLORS = {"local": 5, "centralized": 1, "federated": 3}  # in the page's style, by kind
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 12.0, 40.0
_LABEL_WIDTH, _LABEL_HEIGHT = 90.0, 15.0


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Line:
    """A job's curve; `points` for an SVG polyline, `best` the place of the checkpoint."""

    job: str
    kind: str
    style: str
    points: str
    best: tuple[float, float]
    label_at: tuple[float, float]
    title: str


@dataclass(frozen=True)
class Chart:
    """A picture of `width` by `height` pixels; curves over one validation split.

    With `named`, each line has a color of its own; with `labels` its name beside its end.
    """

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    base_at: float
    lines: list[Line]
    named: bool
    labels: bool


def chart(reports: Sequence[JobReport], width: int, height: int, labels: bool, over: XAxis = "records") -> Chart | None:
    """The chart of these reports, all over one validation split; None if a report does not say what `over` asks for.

    `labels` puts names beside the lines.
    """
    from matplotlib.ticker import MaxNLocator

    costs = [cost for report in reports if (cost := spent(report, over)) is not None]
    if len(costs) < len(reports):
        return None
    named = len(reports) <= MOST_NAMED
    margin = min(max(len(report.job) for report in reports) * 8.2 + 16, 160) if labels and named else _RIGHT
    losses = [loss for report in reports for loss in report.val_loss]
    most = max(map(max, costs)) or 1
    lowest = 0.0 if min(losses) < max(losses) / 2 else min(losses)
    steps = max(3, width // 130)
    y_values = [float(value) for value in MaxNLocator(5).tick_values(lowest, max(losses))]
    x_values = [float(value) for value in MaxNLocator(steps, integer=True).tick_values(0, most) if 0 <= value <= most]
    left, right, top, bottom = _LEFT, width - margin, _TOP, height - _BOTTOM
    low, high = y_values[0], y_values[-1]

    def x(value: float) -> float:
        return round(left + (right - left) * value / most, 1)

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * (value - low) / ((high - low) or 1), 1)

    styles, counts = [], dict.fromkeys(_COLORS, 0)
    for report in reports:
        styles.append(_style(report.kind, counts[report.kind], named))
        counts[report.kind] += 1
    last = [(x(cost[-1]), y(report.val_loss[-1])) for report, cost in zip(reports, costs, strict=True)]
    ends = _apart(last, bottom)
    lines = [
        Line(
            job=report.job,
            kind=report.kind,
            style=style,
            points=" ".join(f"{x(so_far)},{y(loss)}" for so_far, loss in zip(cost, report.val_loss, strict=True)),
            best=(x(cost[report.best_round]), y(report.best_val_loss)),
            label_at=end,
            title=f"{report.job} ({report.kind}): best {report.best_val_loss:.3f} after round {report.best_round}",
        )
        for report, cost, style, end in zip(reports, costs, styles, ends, strict=True)
    ]
    x_ticks = [Tick(x(value), f"{value:,.0f}") for value in x_values]
    y_ticks = [Tick(y(value), f"{value:g}") for value in y_values]
    base = y(reports[0].base_val_loss)
    return Chart(
        *(width, height, left, right, top, bottom, X_LABELS[over], x_ticks, y_ticks, base, lines),
        named=named,
        labels=labels and named,
    )


def _style(kind: str, number: int, named: bool) -> str:
    """The classes of the kind's nth line."""
    if not named:
        return f"{kind} of-many"
    repeated = " dashed" if number >= _COLORS[kind] else ""
    return f"{kind} c{number % _COLORS[kind]}{repeated}"


def _apart(ends: Sequence[tuple[float, float]], bottom: float) -> list[tuple[float, float]]:
    """Places of labels beside the ends of lines, moved up or down so that none covers another."""
    placed: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(ends)), key=lambda index: ends[index][1]):
        x, y = ends[index]
        for other_x, other_y in sorted(placed.values(), key=lambda place: place[1]):
            if abs(other_x - x) < _LABEL_WIDTH and other_y > y - _LABEL_HEIGHT:
                y = other_y + _LABEL_HEIGHT
        placed[index] = (x, y)
    over = max((y for _, y in placed.values()), default=0.0) - bottom
    shift = max(over, 0.0)  # of all alike: they stay apart
    return [(round(placed[index][0] + 10, 1), round(placed[index][1] - shift, 1)) for index in range(len(ends))]
