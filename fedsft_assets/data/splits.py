"""From examples to records in three splits, decided by content alone, and the union over datasets.

A record's place depends on a seed and on what it says, never on its row: new rows move no old row,
and a prompt that occurs in two datasets falls into the same split of both.
"""

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

from fedsft_assets.data.records import DataError, Example, Record, dump_record, numbered_lines, parse_record
from fedsft_assets.data.sources import Dataset
from fedsft_assets.store import SPLITS, folder_digest, publish_folder, split_file

COMBINED = "combined"
DEFAULT_SEED = 1234
DEFAULT_PROPORTIONS = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class SplitReport:
    """What is in a folder of splits: its digest, records per split, what was left out, lengths in characters."""

    digest: str
    counts: dict[str, int]
    duplicates: int
    rejected: int
    mean_input_chars: float
    max_input_chars: int
    mean_output_chars: float
    max_output_chars: int

    @property
    def records(self) -> int:
        """Records in all splits together."""
        return sum(self.counts.values())

    def as_metadata(self) -> dict[str, int | float]:
        """The figures under plain names; the digest is the data version, not metadata."""
        return {
            **self.counts,
            "records": self.records,
            "duplicates": self.duplicates,
            "rejected": self.rejected,
            "mean_input_chars": round(self.mean_input_chars, 1),
            "max_input_chars": self.max_input_chars,
            "mean_output_chars": round(self.mean_output_chars, 1),
            "max_output_chars": self.max_output_chars,
        }


def split_dataset(
    dataset: Dataset,
    raw: Path,
    into: Path,
    seed: int = DEFAULT_SEED,
    proportions: tuple[float, float, float] = DEFAULT_PROPORTIONS,
) -> SplitReport:
    """Write the dataset's files in `raw` as the three splits in `into`, whole or not at all.

    Within a split, records keep the order of their rows. Exact duplicates are dropped and counted,
    and so are rows without an instruction or a response. Raises DataError if a file cannot be read
    or a split would be empty.
    """
    bounds = _bounds(proportions)
    rejected = 0
    seen: set[bytes] = set()
    with publish_folder(into) as fresh:
        with _SplitWriter.open(fresh) as writer:
            for example in dataset.read(raw):
                if not example.instruction.strip() or not example.response.strip():
                    rejected += 1
                    continue
                record = to_record(example, seed)
                line = dump_record(record)
                identity = blake2b(line, digest_size=16).digest()
                if identity in seen:
                    writer.duplicates += 1
                    continue
                seen.add(identity)
                writer.write(split_of(record["input"], seed, bounds), record, line)
        return replace(writer.report(dataset.name, fresh), rejected=rejected)


def combine(folders: list[Path], into: Path, seed: int = DEFAULT_SEED) -> SplitReport:
    """Write the union of several datasets' splits to `into`, shuffled, whole or not at all.

    The order follows from the seed and the records alone: neither the order of `folders` nor new
    records change the order of the others. Texts stay on disk; memory holds one hash and position
    for each record. Raises DataError if a split is missing, empty or holds something else.
    """
    with publish_folder(into) as fresh:
        with _SplitWriter.open(fresh) as writer:
            for split in SPLITS:
                _shuffle_into(writer, split, [split_file(folder, split) for folder in folders], seed)
        return writer.report(COMBINED, fresh)


def to_record(example: Example, seed: int) -> Record:
    """The example as a record: instruction and context, joined by a blank line, in random order.

    Which comes first is a coin thrown for this content and seed. Without a context, the instruction
    stays as it is. This is the meaning of the published preprocessing for NeMo's SFT, see
    https://github.com/NVIDIA/NVFlare/tree/main/integration/nemo/examples/supervised_fine_tuning
    """
    context = example.context.strip()
    if not context:
        return Record(input=example.instruction, output=example.response)
    instruction = example.instruction.strip()
    coin = _hash(f"{instruction}\n\n{context}".encode(), seed, b"order")[0] & 1
    parts = (context, instruction) if coin else (instruction, context)
    return Record(input="\n\n".join(parts), output=example.response)


def normalize_prompt(prompt: str) -> str:
    """The prompt's words without case, white space and order.

    Without order, because the same instruction and context may be joined either way round.
    """
    return " ".join(sorted(prompt.casefold().split()))


def split_of(prompt: str, seed: int, bounds: Iterable[float]) -> str:
    """The split of a record with this input; `bounds` are cumulated proportions, the last one is 1."""
    place = int.from_bytes(_hash(normalize_prompt(prompt).encode(), seed, b"split")) / 2**64
    return next(split for split, bound in zip(SPLITS, bounds, strict=True) if place < bound)


class _SplitWriter:
    """Writes records to three open files and keeps count."""

    def __init__(self, files: dict[str, BinaryIO]) -> None:
        self.duplicates = 0
        self._files = files
        self._counts = dict.fromkeys(SPLITS, 0)
        self._sums = [0, 0]
        self._maxima = [0, 0]

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator["_SplitWriter"]:
        with ExitStack() as stack:
            yield cls({split: stack.enter_context(split_file(folder, split).open("wb")) for split in SPLITS})

    def write(self, split: str, record: Record, line: bytes) -> None:
        self._files[split].write(line)
        self._counts[split] += 1
        for index, text in enumerate((record["input"], record["output"])):
            self._sums[index] += len(text)
            self._maxima[index] = max(self._maxima[index], len(text))

    def report(self, name: str, folder: Path) -> SplitReport:
        """The figures, once the files are closed; DataError if a split is empty."""
        for split, count in self._counts.items():
            if count == 0:
                raise DataError(
                    f"{name}: the {split} split is empty, all splits together hold {sum(self._counts.values())} "
                    "records; add rows, or give that split a larger proportion"
                )
        records = sum(self._counts.values())
        return SplitReport(
            digest=folder_digest(folder),
            counts=self._counts,
            duplicates=self.duplicates,
            rejected=0,
            mean_input_chars=self._sums[0] / records,
            max_input_chars=self._maxima[0],
            mean_output_chars=self._sums[1] / records,
            max_output_chars=self._maxima[1],
        )


def _shuffle_into(writer: _SplitWriter, split: str, paths: list[Path], seed: int) -> None:
    with ExitStack() as stack:
        places: dict[bytes, tuple[int, int, int, int]] = {}
        handles = []
        for index, path in enumerate(paths):
            offset = 0
            for number, line in numbered_lines(path):
                identity = _hash(line.rstrip(b"\n"), seed, b"shuffle", size=16)
                writer.duplicates += identity in places
                places[identity] = (index, number, offset, len(line))
                offset += len(line)
            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            handles.append(handle)
        for _, (index, number, offset, length) in sorted(places.items()):
            record = parse_record(os.pread(handles[index], length, offset), paths[index], number)
            writer.write(split, record, dump_record(record))


def _bounds(proportions: tuple[float, ...]) -> tuple[float, ...]:
    if len(proportions) != len(SPLITS) or min(proportions) <= 0 or not math.isclose(sum(proportions), 1):
        raise DataError(
            f"proportions: expected {len(SPLITS)} positive shares that add up to 1, for {', '.join(SPLITS)}, "
            f"found {proportions}"
        )
    return (*list(accumulate(proportions))[:-1], 1.0)


def _hash(content: bytes, seed: int, purpose: bytes, size: int = 8) -> bytes:
    return blake2b(content, digest_size=size, key=str(seed).encode(), person=purpose).digest()
