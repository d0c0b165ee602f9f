"""Conversion of examples to records in three splits, assigned by content alone.

A record's split depends on a seed and its content, never on its row number: new rows never move old rows,
and a prompt that occurs in two datasets is in the same split of both.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from itertools import accumulate, compress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from fedsft_assets.data.arrow import BLANK_LINE, EMPTY, flags
from fedsft_assets.data.formats.examples import Examples, Rejected
from fedsft_assets.data.formats.readers import read_examples
from fedsft_assets.data.hashing import Hashes, Seen, mixed, prompt_hashes
from fedsft_assets.data.records import DataError, Record, dump_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.files import HashedFile, publish_file, publish_folder
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.store import SPLITS, split_file

REJECTED_FILE = "rejected.jsonl"


def rejected_file(splits: Path) -> Path:
    """The default file for unusable rows if there are too many of them to write `splits`."""
    return splits.with_name(f"{splits.name}.{REJECTED_FILE}")


def split_dataset(
    dataset: DatasetSpec, raw: Path, into: Path, settings: SplitSettings | None = None, rejected: Path | None = None
) -> SplitReport:
    """Split the dataset's files in `raw` into three files in `into`, atomically.

    Within a split, records keep the order of their rows. Exact duplicates are dropped and counted. All records of a
    dataset for testing are in its testing split. Unusable rows go to `rejected.jsonl` beside the splits, with their
    numbers and reasons. Raises DataError if a file cannot be read, a split would be empty, or too many rows are
    unusable: these are then written to `rejected` (default: `<into>.rejected.jsonl`), and the previous splits stay
    unchanged.
    """
    settings = settings or SplitSettings()
    refused = rejected or rejected_file(into)
    with publish_folder(into) as fresh:
        with _Writer(fresh, settings, dataset.use == "testing") as writer:
            for examples in read_examples(dataset, raw):
                writer.write(examples)
        too_many = writer.rejected > settings.max_rejected * writer.rows
        if too_many:
            with publish_file(refused) as path:
                (fresh / REJECTED_FILE).rename(path)
            raise DataError(writer.explain_rejected(dataset.name, refused))
        report = SplitReport.of(
            dataset.name,
            writer.digests,
            settings,
            counts=writer.counts,
            rows=writer.rows,
            duplicates=writer.duplicates,
            rejected=writer.rejected,
            unused=[split for split in SPLITS if split != "testing"] if dataset.use == "testing" else [],
        )
        report.write(fresh)
    refused.unlink(missing_ok=True)
    return report


def first_records(batches: Iterable[Examples], settings: SplitSettings) -> list[Record]:
    """The records of the first batch with usable rows; empty if there is none."""
    for examples in batches:
        usable = examples.usable(settings.max_chars)
        if len(usable.rows):
            inputs, _ = to_inputs(usable.instruction, usable.context, settings.seed)
            pairs = zip(inputs.to_pylist(), usable.response.to_pylist(), strict=True)
            return [Record(input=prompt, output=answer) for prompt, answer in pairs]
    return []


def to_inputs(instruction: pa.StringArray, context: pa.StringArray, seed: int) -> tuple[pa.StringArray, Hashes]:
    """Join instructions and contexts [N] into inputs [N] by a blank line; return these and their `prompt_hashes`.

    Which of the two comes first is random, but fixed for a prompt and seed. Without a context, the
    instruction is unchanged. This matches the published preprocessing for NeMo's SFT, see
    https://github.com/NVIDIA/NVFlare/tree/main/integration/nemo/examples/supervised_fine_tuning
    """
    trimmed, context = pc.utf8_trim_whitespace(instruction), pc.utf8_trim_whitespace(context.fill_null(EMPTY))
    joined = pc.binary_join_element_wise(trimmed, context, BLANK_LINE)
    hashes = prompt_hashes(joined)
    context_first = flags(mixed(hashes, seed, "order") >> np.uint64(63) == 1)
    inputs = pc.if_else(context_first, pc.binary_join_element_wise(context, trimmed, BLANK_LINE), joined)
    return pc.if_else(pc.equal(context, EMPTY), instruction, inputs), hashes


def _split_indexes(prompts: Hashes, settings: SplitSettings) -> npt.NDArray[np.intp]:
    """The index in SPLITS of each prompt's split [N], from its `prompt_hashes` [N]."""
    bounds = np.array([bound * 2.0**64 for bound in list(accumulate(settings.proportions))[:-1]])
    return np.searchsorted(bounds, mixed(prompts, settings.seed, "split").astype(np.float64), side="right")


class _Writer:
    """Writes records to three open files, and unusable rows to a fourth, and keeps count."""

    def __init__(self, folder: Path, settings: SplitSettings, testing_only: bool) -> None:
        self.counts = dict.fromkeys(SPLITS, 0)
        self.rows = self.duplicates = self.rejected = 0
        self._settings, self._testing_only = settings, testing_only
        self._seen = Seen()
        self._files = ExitStack()
        self._splits = [self._files.enter_context(HashedFile(split_file(folder, split))) for split in SPLITS]
        self._rejects: BinaryIO = self._files.enter_context((folder / REJECTED_FILE).open("wb"))
        self._first_rejected: list[Rejected] = []

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._files.__exit__(*error)

    @property
    def digests(self) -> dict[str, str]:
        """The digest of each split's file by file name, once the files are closed."""
        return {split_file(Path(), split).name: file.digest for split, file in zip(SPLITS, self._splits, strict=True)}

    def write(self, examples: Examples) -> None:
        usable = examples.usable(self._settings.max_chars)
        self._reject(usable.rejected)
        self.rows += len(usable.rows) + len(usable.rejected)
        inputs, prompts = to_inputs(usable.instruction, usable.context, self._settings.seed)
        indexes = self._indexes(prompts if usable.anchor is None else prompt_hashes(usable.anchor))
        pairs = list(zip(inputs.to_pylist(), usable.response.to_pylist(), strict=True))
        # Python's hash is salted per process, but these hashes never leave it.
        fresh = self._seen.first(np.fromiter(map(hash, pairs), np.int64, len(pairs)).view(np.uint64))
        self.duplicates += int((~fresh).sum())
        for index, (split, file) in enumerate(zip(SPLITS, self._splits, strict=True)):
            chosen = [Record(input=i, output=o) for i, o in compress(pairs, (fresh & (indexes == index)).tolist())]
            file.write(dump_records(chosen))
            self.counts[split] += len(chosen)

    def _indexes(self, prompts: Hashes) -> npt.NDArray[np.intp]:
        """The index in SPLITS of each prompt's split [N]."""
        if self._testing_only:
            return np.full(len(prompts), SPLITS.index("testing"))
        return _split_indexes(prompts, self._settings)

    def explain_rejected(self, name: str, path: Path) -> str:
        first = "; ".join(f"{row.file} row {row.row}: {row.reason} ({row.found})" for row in self._first_rejected)
        return (
            f"{name}: {self.rejected} of {self.rows} rows cannot be used, more than the allowed share of "
            f"{self._settings.max_rejected:.2%}: {first}{', …' if self.rejected > len(self._first_rejected) else ''}; "
            f"all are in {path}; fix them, or raise max_rejected"
        )

    def _reject(self, rejected: list[Rejected]) -> None:
        self.rejected += len(rejected)
        self._first_rejected += rejected[: 3 - len(self._first_rejected)]
        for row in rejected:
            self._rejects.write(orjson.dumps(row._asdict(), option=orjson.OPT_APPEND_NEWLINE))
