"""Percentiles and a histogram of token lengths."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsft_assets.files import publish_file


def percentiles(lengths: npt.NDArray[np.int32]) -> dict[str, int]:
    """The 50th, 95th and 99th percentile and the maximum of lengths [N], N at least 1."""
    p50, p95, p99 = (int(value) for value in np.percentile(lengths, [50, 95, 99], method="inverted_cdf"))
    return {"p50": p50, "p95": p95, "p99": p99, "max": int(lengths.max())}


def plot_lengths(lengths: npt.NDArray[np.int32], window: int, title: str, into: Path) -> None:
    """Write a histogram of token lengths [N] as a PNG, with the model's window and the number of records beyond it."""
    from matplotlib.figure import Figure

    longest = float(np.percentile(lengths, 99.5))
    end = max(longest * 1.1, window * 1.1 if window < 2 * longest else 0)  # a far larger window would squeeze the bars
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(np.minimum(lengths, end), bins=60, range=(0, end), color="#4c78a8")
    if window < end:
        axes.axvline(window, color="#e45756", linewidth=1.5)
    over = int((lengths > window).sum())
    axes.set_title(title, loc="left", weight="bold")
    label = f"tokens per record: {over:,} of {len(lengths):,} records exceed the model's window of {window:,}"
    axes.set(xlabel=label, ylabel="records", xlim=(0, end))
    axes.spines[["top", "right"]].set_visible(False)
    with publish_file(into) as path:
        figure.savefig(path, dpi=110, format="png")
