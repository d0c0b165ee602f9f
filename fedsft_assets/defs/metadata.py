"""Plain values as Dagster metadata."""

import base64
from collections.abc import Sequence
from pathlib import Path

import dagster as dg


def image(path: Path) -> dg.MarkdownMetadataValue:
    """A PNG shown inline in Dagster's UI."""
    content = base64.b64encode(path.read_bytes()).decode()
    return dg.MetadataValue.md(f"![{path.stem}](data:image/png;base64,{content})")


def code(text: str, language: str = "") -> dg.MarkdownMetadataValue:
    """A block of preformatted text."""
    return dg.MetadataValue.md(f"```{language}\n{text}\n```")


def curve(samples: Sequence[int], losses: Sequence[float]) -> dg.MarkdownMetadataValue:
    """A loss by round as a table; round 0 is the base model."""
    rows = [f"| {k} | {seen:,} | {loss:.4f} |" for k, (seen, loss) in enumerate(zip(samples, losses, strict=True))]
    return dg.MetadataValue.md("\n".join(["| round | records | loss |", "| ---: | ---: | ---: |", *rows]))
