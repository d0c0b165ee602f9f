"""Quality measurements of splits: blank outputs, prompts in several splits, languages.

Reads one record at a time and holds a few bytes of each. Thresholds are applied elsewhere.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from fedsft_assets.data.arrow import texts
from fedsft_assets.data.hashing import Hashes, prompt_hashes
from fedsft_assets.data.records import excerpt, iterate_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets.versions import title

_NO_LANGUAGE = "zxx"  # ISO 639's code for numbers, formulas and the like
_BATCH = 1024  # records
_EXAMPLES = 5
_CHARS = 1000  # of an input and of an output: enough to detect the language

_Place = tuple[Path, str]


@dataclass(frozen=True)
class BlankOutputs:
    """The number of blank outputs in a split, and the line numbers of the first few, from 1."""

    count: int
    lines: list[int]


@dataclass(frozen=True)
class SharedPrompt:
    """A prompt in several splits: its beginning, and each `<folder>/<split>` that contains it."""

    text: str
    places: list[str]


@dataclass(frozen=True)
class Overlap:
    """The number of distinct prompts in several splits, and up to five of them."""

    count: int
    examples: list[SharedPrompt]


@dataclass(frozen=True)
class Languages:
    """The number of sampled records per language, by ISO 639 code; those without words count as `zxx`."""

    counts: Mapping[str, int]

    @property
    def sampled(self) -> int:
        return sum(self.counts.values())

    @property
    def worded(self) -> int:
        """The number of records with words."""
        return self.sampled - self.counts.get(_NO_LANGUAGE, 0)

    def share(self, languages: Sequence[str]) -> float:
        """The share of records in these languages among those with words; 1 if there are none."""
        return sum(self.counts.get(code, 0) for code in set(languages)) / self.worded if self.worded else 1.0


def blank_outputs(folder: Path) -> dict[str, BlankOutputs]:
    """The blank outputs of each split. Raises DataError for a split that cannot be read."""
    return {split: _blank_outputs(split_file(folder, split)) for split in SPLITS}


def prompt_overlap(folders: Sequence[Path]) -> Overlap:
    """The prompts in more than one split, across all folders.

    Prompts are the same if they have the same words, ignoring case, white space and order. Holds 8 bytes
    per record. Raises DataError for a split that cannot be read.
    """
    places: dict[_Place, Hashes] = {
        (folder, split): _prompts(split_file(folder, split)) for folder in folders for split in SPLITS
    }
    by_split = [np.unique(np.concatenate([places[folder, split] for folder in folders])) for split in SPLITS]
    prompts, splits = np.unique(np.concatenate(by_split), return_counts=True)
    shared = prompts[splits > 1]
    return Overlap(len(shared), [_shared_prompt(prompt, places) for prompt in shared[:_EXAMPLES]])


def language_sample(folder: Path, records: int = 500) -> Languages:
    """The languages of up to `records` records, spread evenly over the splits; the same sample on every call.

    The language is detected from input and output together. Raises DataError for a report or split that
    cannot be read.
    """
    from py3langid import classify

    total = SplitReport.read(folder).records
    sampled = min(records, total)
    chosen = {number * total // sampled for number in range(sampled)}
    texts = (text for number, text in enumerate(_texts(folder)) if number in chosen)
    return Languages(Counter(classify(text)[0] for text in texts))


def _blank_outputs(path: Path) -> BlankOutputs:
    numbered = enumerate(iterate_records(path), start=1)
    lines = [number for number, record in numbered if not record["output"].strip()]
    return BlankOutputs(len(lines), lines[:_EXAMPLES])


def _prompts(path: Path) -> Hashes:
    """The `prompt_hashes` of a split's N inputs, uint64 [N]."""
    hashes = [np.zeros(0, np.uint64)]
    records = iterate_records(path)
    while batch := list(islice(records, _BATCH)):
        hashes.append(prompt_hashes(texts([record["input"] for record in batch])))
    return np.concatenate(hashes)


def _shared_prompt(prompt: np.uint64, places: Mapping[_Place, Hashes]) -> SharedPrompt:
    found = {place: np.flatnonzero(hashes == prompt) for place, hashes in places.items()}
    holding = {place: int(lines[0]) for place, lines in found.items() if len(lines)}
    (folder, split), line = next(iter(holding.items()))
    record = next(islice(iterate_records(split_file(folder, split)), line, None))
    return SharedPrompt(excerpt(record["input"]), [f"{title(folder)}/{split}" for folder, split in holding])


def _texts(folder: Path) -> Iterator[str]:
    """Yield the text of each record for language detection, in split order."""
    for split in SPLITS:
        for record in iterate_records(split_file(folder, split)):
            yield f"{record['input'][:_CHARS]}\n{record['output'][:_CHARS]}"
