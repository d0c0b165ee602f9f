"""The evaluation of one model: its loss on each record of the testing splits, scored once, in one table.

Everything else that is said of a model's quality is computed from this table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pyarrow as pa

from fedsft_assets.data.hashing import byte_hashes, prompt_hashes
from fedsft_assets.data.records import DataError, iterate_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.model.record_losses import losses_of
from fedsft_assets.specs.plan import ResolvedTraining
from fedsft_assets.store import Store, split_file

if TYPE_CHECKING:
    import pandas as pd

    from fedsft_assets.model.language_model import LanguageModel

LOSSES_FILE = "losses.parquet"
_INPUTS_FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """What was scored: a model by the name of its job, on a version of the combined splits; digests of both.

    `max_length` is the length in tokens that records were cut to. `seed` is what the model was trained with; None for a
    base model, unless each seed of the study has its own.
    """

    model: str
    archive_digest: str
    testing_split: str
    max_length: int
    seed: int | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of a version of an evaluation."""
        return cls(**json.loads((folder / _INPUTS_FILE).read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        (folder / _INPUTS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def scored_records(store: Store, combined: Path, most: int | None = None) -> pd.DataFrame:
    """The records of the combined testing split and the datasets that they are from.

    A row for each dataset that has a record: `row`, its place in the combined split; `dataset`; `record` and `prompt`,
    digests of 16 hexadecimal digits, equal for prompts that are equal but for case, white space and order of words;
    `first`, false where a record's row above is of another dataset. `most` takes the first so many records only.
    Raises DataError if a split is missing or is not what the combined one was made of.
    """
    import pandas as pd

    lines = split_lines(split_file(combined, "testing"))[:most]
    places = {digest: row for row, digest in enumerate(byte_hashes(lines).tolist())}
    records = iterate_records(split_file(combined, "testing"))
    inputs = [record["input"] for record in islice(records, len(lines))]
    prompts = prompt_hashes(pa.array(inputs, pa.string()))
    parts = SplitReport.read(combined).parts
    found = []
    for dataset, version in sorted(parts.items()):
        own = byte_hashes(split_lines(split_file(store.processed(dataset) / version, "testing")))
        rows = np.unique([places[digest] for digest in own.tolist() if digest in places]).astype(np.int64)
        found.append(pd.DataFrame({"row": rows, "dataset": dataset}))
    table = pd.concat(found).sort_values(["row", "dataset"], ignore_index=True)
    if table["row"].nunique() != len(lines):
        raise DataError(f"{combined}: its testing split has records of no dataset; materialize `combined` again")
    digests = pd.Series([f"{digest:016x}" for digest in places])
    return table.assign(
        record=digests.loc[table["row"]].to_numpy(),
        prompt=[f"{prompts[row]:016x}" for row in table["row"]],
        first=~table["row"].duplicated(),
    )


def evaluate(
    model: LanguageModel, store: Store, combined: Path, training: ResolvedTraining, most: int | None = None
) -> pd.DataFrame:
    """The rows of `scored_records`, each with `tokens`, the record's answer tokens, and `loss`, their sum in nats.

    Each record is scored once. Raises DataError.
    """
    table = scored_records(store, combined, most)
    scores = losses_of(model, split_file(combined, "testing"), training, most)
    rows = table["row"].to_numpy()
    return table.drop(columns="row").assign(tokens=scores.tokens[rows], loss=scores.losses[rows])


def read_losses(evaluations: Iterable[Path]) -> pd.DataFrame:
    """The tables of these versions of evaluations as one.

    Columns are added for `model`, a job's name or `base_model`, and `seed`, missing for a model without.
    """
    import pandas as pd

    tables = []
    for folder in evaluations:
        scored = Evaluation.read(folder)
        seed = pd.array([scored.seed], dtype="Int64")[0]
        tables.append(pd.read_parquet(folder / LOSSES_FILE).assign(model=scored.model, seed=seed))
    return pd.concat(tables, ignore_index=True).astype({"seed": "Int64"})


def common_records(losses: pd.DataFrame) -> pd.DataFrame:
    """The rows of records that every model was scored on: a job may have been told to score a part of them only."""
    scored_by = losses.groupby(["dataset", "record"])["record"].transform("size")
    return losses[scored_by == len(losses[["model", "seed"]].drop_duplicates())]


def split_lines(path: Path) -> list[bytes]:
    """The records of a split as they are written."""
    try:
        return [line for line in path.read_bytes().splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; make it before what needs it") from error
