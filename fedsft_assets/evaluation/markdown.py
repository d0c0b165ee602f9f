"""Tables in Markdown, readable in a terminal too."""

from collections.abc import Sequence

from tabulate import tabulate


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """A Markdown table; the first `texts` columns are texts, the others numbers."""
    align = (*["left"] * texts, *["right"] * (len(headers) - texts))
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)
