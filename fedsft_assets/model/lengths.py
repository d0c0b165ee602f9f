"""How many tokens the records of a folder of splits have: measured once for each content and tokenizer."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fedsft_assets.data.records import Record, iterate_records
from fedsft_assets.data.report import SplitReport
from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE, template
from fedsft_assets.store import SPLITS, publish_file, split_file

LENGTHS_FILE = "token_lengths.npz"
_BATCH = 512  # records
_BATCHES = 8  # in memory at once

Lengths = npt.NDArray[np.int32]


def token_lengths(folder: Path, tokenizer: Tokenizer) -> Lengths:
    """Tokens of each record, int32 [N], in the order of training, validation and testing.

    What a trainer sees before it cuts: template, input, output, and the tokens that begin and end them.
    """
    # The tokenizer's own description names it; the digest names the records.
    key = f"{SplitReport.read(folder).digest} {hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}"
    kept = folder / LENGTHS_FILE
    if kept.is_file():
        with np.load(kept) as content:
            if str(content["key"]) == key:
                return np.asarray(content["lengths"])
    lengths = _measure(folder, tokenizer)
    with publish_file(kept) as path, path.open("wb") as file:
        np.savez_compressed(file, key=key, lengths=lengths)
    return lengths


def _measure(folder: Path, tokenizer: Tokenizer) -> Lengths:
    tokenizer.encode_special_tokens = True  # one that is spelled out in a record is plain text
    style = template(DEFAULT_TEMPLATE)
    added = len(tokenizer.encode("a").ids) - len(tokenizer.encode("a", add_special_tokens=False).ids) + 1

    def measure(records: list[Record]) -> list[int]:
        texts = [style.prompt(r["input"]) for r in records] + [style.answer(r["output"]) for r in records]
        counts = [len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        return [sum(pair) + added for pair in zip(counts[: len(records)], counts[len(records) :], strict=True)]

    batches = _batches(folder)
    lengths: list[int] = []
    with ThreadPoolExecutor() as pool:
        while group := list(islice(batches, _BATCHES)):
            for measured in pool.map(measure, group):
                lengths += measured
    return np.array(lengths, np.int32)


def _batches(folder: Path) -> Iterator[list[Record]]:
    for split in SPLITS:
        records = iterate_records(split_file(folder, split))
        while batch := list(islice(records, _BATCH)):
            yield batch
