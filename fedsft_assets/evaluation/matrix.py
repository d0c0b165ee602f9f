"""Models by datasets: the loss of each model on the combined testing split and on each dataset's own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedsft_assets.specs.dataset import COMBINED

if TYPE_CHECKING:
    import pandas as pd


def loss_matrix(losses: pd.DataFrame) -> pd.DataFrame:
    """Nats per answer token by `model`, the mean over its seeds, with columns for `combined` and each dataset.

    `losses` has the columns `model`, `seed`, `dataset`, `first`, `tokens` and `loss` of record_scores, of any number of
    models, whose seeds were all scored on the same records. A record that several datasets have counts once in
    `combined`. Models are in their order in `losses`.
    """
    own = losses.groupby(["model", "dataset"], sort=False)[["loss", "tokens"]].sum()
    combined = losses[losses["first"]].groupby("model", sort=False)[["loss", "tokens"]].sum()
    matrix = (own["loss"] / own["tokens"]).unstack("dataset").sort_index(axis="columns")
    matrix.insert(0, COMBINED, combined["loss"] / combined["tokens"])
    return matrix.loc[losses["model"].unique()]


def gains(matrix: pd.DataFrame, over: str) -> pd.DataFrame:
    """How much lower each model's loss is than that of the model `over`, in nats per answer token; same shape."""
    return matrix.loc[over] - matrix
