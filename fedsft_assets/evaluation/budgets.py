"""What each job of a comparison cost: as a table, and in words where jobs differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fedsft_assets.federation.protocol.job_report import JobReport

if TYPE_CHECKING:
    import pandas as pd

# Headers and rows of a table.
Cells = tuple[tuple[str, ...], list[tuple[str, ...]]]

UNKNOWN = "unknown"
_MB = 1e6

_COLUMNS: dict[str, Callable[[JobReport], Any]] = {
    "job": lambda report: report.job,
    "kind": lambda report: report.kind,
    "seed": lambda report: report.seed,
    "rounds": lambda report: report.rounds,
    "steps": lambda report: report.steps,
    "tokens": lambda report: report.tokens,
    "records": lambda report: report.samples[-1],
    "bytes_up": lambda report: report.sent,
    "bytes_down": lambda report: report.received,
    "seconds": lambda report: report.seconds,
    "cpu_seconds": lambda report: report.cpu_seconds,
    "peak_memory": lambda report: report.peak_memory,
}
_MAYBE_UNKNOWN = {
    **dict.fromkeys(("seed", "steps", "bytes_up", "bytes_down", "peak_memory"), "Int64"),
    "cpu_seconds": "Float64",
}


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _mb(number: float) -> str:
    return f"{number / _MB:,.1f}"


# How the tables in Markdown call a column, and show its numbers.
_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "rounds": ("rounds", _count),
    "steps": ("steps", _count),
    "tokens": ("tokens trained", _count),
    "bytes_up": ("MB up", _mb),
    "bytes_down": ("MB down", _mb),
    "seconds": ("seconds", _count),
    "cpu_seconds": ("CPU seconds", _count),
    "peak_memory": ("peak memory, MB", _mb),
}
# What jobs are told to differ in, besides answer tokens; seconds depend on what else a machine does.
_COMPARED = {
    "steps": "optimizer steps",
    "bytes_up": "MB sent by sites",
    "bytes_down": "MB sent to sites",
    "cpu_seconds": "CPU seconds",
}


def budgets(reports: Sequence[JobReport]) -> pd.DataFrame:
    """A row for each job and seed, with its costs (see `JobReport`); bytes are of all sites together.

    What is unknown, of jobs of an earlier version of this package, is <NA>.
    """
    import pandas as pd

    rows = [[value(report) for value in _COLUMNS.values()] for report in reports]
    return pd.DataFrame(rows, columns=list(_COLUMNS)).astype(_MAYBE_UNKNOWN)


def traffic(reports: Sequence[JobReport]) -> pd.DataFrame:
    """A row for each job, seed and site: `bytes_up` from the site to the server, `bytes_down` to the site.

    Jobs of an earlier version of this package, of which it is unknown, have none.
    """
    import pandas as pd

    rows = [
        (report.job, report.seed, site, one["sent"], one["received"])
        for report in reports
        for site, one in (report.traffic or {}).items()
    ]
    return pd.DataFrame(rows, columns=["job", "seed", "site", "bytes_up", "bytes_down"]).astype({"seed": "Int64"})


def budget_cells(reports: Sequence[JobReport]) -> Cells:
    """The budgets of jobs as texts: the headers of a table, and a row for each job."""
    rows = [
        (report.job, *(_shown(_COLUMNS[name](report), show) for name, (_, show) in _SHOWN.items()))
        for report in reports
    ]
    return ("job", *(title for title, _ in _SHOWN.values())), rows


def traffic_cells(reports: Sequence[JobReport]) -> Cells:
    """The traffic of jobs as texts: the headers of a table, and a row for each job and site."""
    lines = traffic(reports).itertuples(index=False)
    return ("job", "site", "MB up", "MB down"), [(job, site, _mb(up), _mb(down)) for job, _, site, up, down in lines]


def differing_budgets(reports: Sequence[JobReport], tolerance: float) -> list[str]:
    """A sentence if jobs over all data differ in what they cost by more than `tolerance` of the smallest.

    Local jobs train on less data, and cost less. Answer tokens have sentences of their own.
    """
    differences = []
    for name, words in _COMPARED.items():
        known = {report.job: _COLUMNS[name](report) for report in reports if report.kind != "local"}
        known = {job: cost for job, cost in known.items() if cost is not None}
        if len(known) < 2:
            continue
        least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        if known[most] > known[least] * (1 + tolerance):
            show = _SHOWN[name][1]
            differences.append(f"{words} ({show(known[least])} of {least} to {show(known[most])} of {most})")
    return [f"the jobs over all data also differ in {', '.join(differences)}"] if differences else []


def _shown(number: float | None, show: Callable[[float], str]) -> str:
    return UNKNOWN if number is None else show(number)
