"""Plain values as Dagster metadata, and Dagster's as tags of MLflow."""

import base64
import os
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from fedsft_assets.process_env import DAGSTER_PAGES


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


def run_tags(context: dg.AssetExecutionContext) -> dict[str, str]:
    """Tags of an MLflow run: the Dagster run and asset that it is of, with the run's page if its address is known."""
    pages = os.environ.get(DAGSTER_PAGES)
    return {
        "dagster.run_id": context.run_id,
        "dagster.asset": context.asset_key.to_user_string(),
        **({"dagster.run_url": f"{pages}/runs/{context.run_id}"} if pages else {}),
    }
