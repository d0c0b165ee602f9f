"""The splits of a job as MLflow's datasets: what it was trained, validated and scored on, by digest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

Context = Literal["training", "validation", "testing"]

_DIGEST_LENGTH = 36  # MLflow's limit
_TESTING, _VALIDATION = ("test_loss", "perplexity"), ("best_val_loss", "last_val_loss", "base_val_loss")


@dataclass(frozen=True)
class UsedSplit:
    """A split that a job used: of which dataset, the digest of that dataset's splits, and the split's file."""

    dataset: str
    context: Context
    digest: str
    path: str

    @property
    def name(self) -> str:
        """The name of MLflow's dataset. It has the split in it, since MLflow keeps one context for each dataset."""
        return f"{self.dataset}/{self.context}"

    @property
    def short_digest(self) -> str:
        return self.digest[:_DIGEST_LENGTH]


def dataset_inputs(used: Iterable[UsedSplit]) -> list[DatasetInput]:
    """The splits as inputs of an MLflow run."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    return [
        DatasetInput(
            Dataset(split.name, split.short_digest, "local", json.dumps({"uri": split.path})),
            [InputTag(MLFLOW_DATASET_CONTEXT, split.context)],
        )
        for split in used
    ]


def scored_split(metric: str, data: str) -> tuple[str, str] | tuple[None, None]:
    """Name and digest of the combined split that a result was computed on; `data` is the digest of the splits."""
    for context, metrics in (("testing", _TESTING), ("validation", _VALIDATION)):
        if metric in metrics:
            return f"combined/{context}", data[:_DIGEST_LENGTH]
    return None, None
