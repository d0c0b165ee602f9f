"""From a table with one row for each model and record to the losses of each prompt."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from fedsft_assets.evaluation.statistics.prompt_losses import Model, Numbers, PromptLosses, ScoresError

COLUMNS = ("job", "seed", "dataset", "record", "prompt", "tokens", "loss")


def by_prompt(table: pd.DataFrame) -> PromptLosses:
    """Sum a table of one row for each model and record over the records of each prompt.

    Columns: `job`, `seed` (missing for a model without training), `dataset`, `record` and `prompt` (digests), `tokens`
    (answer tokens) and `loss` (their summed loss in nats). The order of rows plays no part. Raises ScoresError if a
    column is missing, a number is none or impossible, or the models were not scored on the same records and tokens.
    """
    if missing := [name for name in COLUMNS if name not in table]:
        raise ScoresError(f"the scores have no column {', '.join(missing)}; expected {', '.join(COLUMNS)}")
    if table.empty:
        raise ScoresError("the scores have no row; score at least one record")
    _require_sound_numbers(table)
    keys = ["prompt", "dataset", "record"]
    models = _models(table)
    losses: list[Numbers] = []
    first: pd.DataFrame | None = None
    for model in models:
        rows = table[table["job"] == model.job]
        rows = rows[rows["seed"].isna()] if model.seed is None else rows[rows["seed"] == model.seed]
        rows = rows.sort_values(keys, ignore_index=True)
        _require_single(rows, model)
        first = rows if first is None else first
        _require_same(first, rows, models[0], model)
        losses.append(rows["loss"].to_numpy(np.float64))
    assert first is not None, "a table with a row has a model"
    starts = np.flatnonzero((first["prompt"] != first["prompt"].shift()).to_numpy())
    tokens = np.add.reduceat(first["tokens"].to_numpy(np.float64), starts)
    return PromptLosses(models, tokens, np.add.reduceat(np.stack(losses), starts, axis=1), len(first))


def _models(table: pd.DataFrame) -> tuple[Model, ...]:
    pairs = table[["job", "seed"]].drop_duplicates()
    models = [Model(str(job), None if pd.isna(seed) else int(seed)) for job, seed in pairs.itertuples(index=False)]
    for job in {model.job for model in models}:
        seeds = [model.seed for model in models if model.job == job]
        if None in seeds and len(seeds) > 1:
            raise ScoresError(f"{job}: some scores have a seed and some have none; give all of them one")
    return tuple(sorted(models, key=lambda model: (model.job, -1 if model.seed is None else model.seed)))


def _require_sound_numbers(table: pd.DataFrame) -> None:
    for column, sound, expected in (
        ("tokens", table["tokens"] >= 1, "at least one answer token"),
        ("loss", np.isfinite(table["loss"].to_numpy(np.float64)) & (table["loss"] >= 0), "a finite loss, not below 0"),
    ):
        if not np.all(sound):
            row = table[~np.asarray(sound, dtype=bool)].iloc[0]
            raise ScoresError(
                f"{row['job']}: record {row['record']} of {row['dataset']}: {column} is {row[column]};"
                f" expected {expected}"
            )


def _require_single(rows: pd.DataFrame, model: Model) -> None:
    twice = rows.duplicated(["dataset", "record"])
    if twice.any():
        row = rows[twice].iloc[0]
        raise ScoresError(f"{model}: record {row['record']} of {row['dataset']} is scored more than once")


def _require_same(first: pd.DataFrame, rows: pd.DataFrame, first_model: Model, model: Model) -> None:
    keys: Sequence[str] = ("prompt", "dataset", "record")
    if len(first) != len(rows) or any((first[key] != rows[key]).any() for key in keys):
        raise ScoresError(
            f"{first_model} and {model} were not scored on the same records"
            f" ({len(first):,} and {len(rows):,}); score both on one testing split"
        )
    differ = (first["tokens"] != rows["tokens"]).to_numpy()
    if differ.any():
        row = int(np.flatnonzero(differ)[0])
        raise ScoresError(
            f"record {rows['record'][row]} of {rows['dataset'][row]} has {first['tokens'][row]} answer tokens for"
            f" {first_model} and {rows['tokens'][row]} for {model}; losses a token compare with one tokenizer alone"
        )
