"""A cache of the tokens of a JSONL split, beside the split, by content and tokenizer.

The data assets fill the cache, and trainers read it. If it cannot be written, tokens are computed on each use.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import orjson
import tokenizers
from tokenizers import Tokenizer

from fedsft_assets.data.records import DataError, Record, iterate_records
from fedsft_assets.files import file_digest, publish_file
from fedsft_assets.model.prompt_template import PromptTemplate, template
from fedsft_assets.model.tokenizer.encode import TextEncoder

if TYPE_CHECKING:
    from fedsft_assets.model.training.batches import Tokens

_FORMAT = 2
_BATCH = 512  # records
_BATCHES = 8  # in memory at a time
_KEPT = 3  # tokenizers per content of a split
_HEX = 32  # hex digits of a digest in a file name

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Tokenized:
    """The N records of one JSONL split as tokens, not truncated, without BOS and EOS.

    `ids` int32 [T] are the concatenated ids of all records, each prompt followed by its answer, from `TextEncoder`;
    `starts` int64 [N + 1] are the records' start indices and the total T; `prompts` int32 [N] are the numbers of ids
    in the prompts.
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int32]

    def records(self, max_length: int, front: Sequence[int], eos: int, most: int | None = None) -> list[Tokens]:
        """The first `most` records for training, in split order, truncated to `max_length` tokens by `batches.cut`.

        `front` is prepended and `eos` appended to each.
        """
        from fedsft_assets.model.training.batches import cut

        starts = self.starts[: len(self.prompts[:most]) + 1].tolist()
        return [
            cut(
                self.ids[start : start + prompt].tolist(),
                self.ids[start + prompt : end].tolist(),
                max_length,
                front,
                eos,
            )
            for start, end, prompt in zip(starts, starts[1:], self.prompts.tolist(), strict=False)
        ]


def tokenized(records_file: Path, tokenizer: bytes | Tokenizer, prompt_template: str) -> Tokenized:
    """The tokens of a JSONL split: from the cache beside it, or computed on all cores and cached.

    `tokenizer` is a tokenizer.json or a tokenizer loaded from one; special tokens spelled out in a record are plain
    text. If several processes need the same tokens, one computes them while the others wait. Raises DataError for
    unusable records, and ModelError for an unusable tokenizer or template.
    """
    description = tokenizer if isinstance(tokenizer, bytes) else tokenizer.to_str().encode()
    style, way = template(prompt_template), _way(description, prompt_template)
    content = _digest(records_file)
    prefix = f".tokens-{records_file.stem}-{content[:_HEX]}"
    cached = records_file.with_name(f"{prefix}-{way[:_HEX]}.npz")
    tokens = _read(cached)
    if tokens is not None:
        return tokens
    with _locked(records_file):
        tokens = _read(cached)
        if tokens is None:
            tokens = _encode(records_file, TextEncoder(description), style)
            if _digest(records_file) == content:  # otherwise the file was replaced, and these are the new one's tokens
                _write(tokens, cached)
                _evict(records_file, prefix)
    return tokens


def _digest(records_file: Path) -> str:
    try:
        return file_digest(records_file)
    except OSError as error:
        raise DataError(f"{records_file}: cannot be read: {error.strerror}; regenerate the splits") from error


@lru_cache(maxsize=2)  # takes a good part of a second with a large vocabulary, and is needed for each split
def _way(description: bytes, prompt_template: str) -> str:
    """SHA-256 in hex of everything that determines the ids of a record, and nothing else.

    A preset's tokenizer and that of an archive made from it so share their tokens, although transformers adds special
    tokens, padding and a post-processor to the latter.
    """
    way = [_FORMAT, tokenizers.__version__, template(prompt_template).text, TextEncoder(description).way]
    return hashlib.sha256(orjson.dumps(way, option=orjson.OPT_SORT_KEYS)).hexdigest()


@contextmanager
def _locked(records_file: Path) -> Iterator[None]:
    """Hold the split's lock, which is released with this process at the latest."""
    with records_file.open("rb") as file:
        if os.access(records_file.parent, os.W_OK):  # otherwise nothing is cached, so waiting is useless
            with suppress(OSError):  # without file locks, several processes may do the same work
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(cached: Path) -> Tokenized | None:
    """The cached tokens; None if missing or damaged, as detected by checksums in the file."""
    if not cached.is_file():
        return None
    try:
        with np.load(cached) as parts:
            return Tokenized(parts["ids"], parts["starts"], parts["prompts"])
    except Exception as error:  # a damaged file can raise anything
        _log.warning("%s: damaged (%s: %s); tokenizing again", cached, type(error).__name__, error)
        return None


def _encode(records_file: Path, encoder: TextEncoder, style: PromptTemplate) -> Tokenized:
    def encode(records: list[Record]) -> tuple[array[int], list[int]]:
        """The ids of some records, and alternately the numbers of ids of each record and its prompt."""
        prompts = [style.prompt(record["input"]) for record in records]
        answers = [style.answer(record["output"]) for record in records]
        ids, counts = array("i"), list[int]()
        for whole, prompt in encoder.records(prompts, answers):
            ids.fromlist(whole)
            counts += (len(whole), prompt)
        return ids, counts

    batches = _batches(records_file)
    ids, counts = array("i"), array("i")
    with ThreadPoolExecutor() as pool:
        while group := list(islice(batches, _BATCHES)):
            for some_ids, some_counts in pool.map(encode, group):
                ids.extend(some_ids)
                counts.fromlist(some_counts)
    wholes, prompts = np.array(counts, np.int32).reshape(-1, 2).T
    starts = np.concatenate([[0], np.cumsum(wholes, dtype=np.int64)])
    return Tokenized(np.asarray(ids, np.int32), starts, prompts.copy())


def _batches(records_file: Path) -> Iterator[list[Record]]:
    records = iterate_records(records_file)
    while batch := list(islice(records, _BATCH)):
        yield batch


def _write(tokens: Tokenized, cached: Path) -> None:
    try:
        with publish_file(cached) as path, path.open("wb") as file:
            np.savez(file, ids=tokens.ids, starts=tokens.starts, prompts=tokens.prompts)
    except OSError as error:
        _log.info("%s: cannot cache tokens: %s", cached.parent, error)


def _evict(records_file: Path, prefix: str) -> None:
    """Remove cached tokens of the split's earlier contents, and of all but the most recent tokenizers."""
    digest = "?" * _HEX
    found = records_file.parent.glob(f".tokens-{glob.escape(records_file.stem)}-{digest}-{digest}.npz")
    with suppress(OSError):
        newest_first = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
        current = [path for path in newest_first if path.name.startswith(prefix)]
        for path in set(newest_first) - set(current[:_KEPT]):
            path.unlink()
