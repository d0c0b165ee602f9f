"""The tokens of a JSONL split: made once for each content and tokenizer, and kept beside it for all who need them.

The data assets fill the cache, sites' trainers read it. Where it cannot be kept, tokens are made anew, never wrong.
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
_BATCHES = 8  # in memory at once
_KEPT = 3  # tokenizers, for one content of a split
_HEX = 32  # digits of a digest in a file's name

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Tokenized:
    """The N records of one JSONL split as tokens, uncut, without BOS and EOS.

    `ids` int32 [T] are the prompt and then the answer of each record, one record after another, as `TextEncoder` has
    them;
    `starts` int64 [N + 1] say where each begins and the last one ends; `prompts` int32 [N] how many
    of a record's ids are its prompt's.
    """

    ids: npt.NDArray[np.int32]
    starts: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int32]

    def records(self, max_length: int, front: Sequence[int], eos: int, most: int | None = None) -> list[Tokens]:
        """The first `most` records as a trainer takes them, in the split's order, none longer than `max_length`.

        `front` stands before each, `eos` at the end; what does not fit is cut by `batches.cut`.
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
    """The tokens of a JSONL split: from the file beside it, else made by all cores and kept there.

    `tokenizer` is a tokenizer.json or what was read from one; special tokens spelled out in a record
    are plain text. Of several processes that want the same tokens, one makes them while the others wait.
    Raises DataError for records and ModelError for a tokenizer or template that cannot be used.
    """
    description = tokenizer if isinstance(tokenizer, bytes) else tokenizer.to_str().encode()
    style, way = template(prompt_template), _way(description, prompt_template)
    content = _digest(records_file)
    start = f".tokens-{records_file.stem}-{content[:_HEX]}"
    kept = records_file.with_name(f"{start}-{way[:_HEX]}.npz")
    tokens = _read(kept)
    if tokens is not None:
        return tokens
    with _turn(records_file):
        tokens = _read(kept)
        if tokens is None:
            tokens = _make(records_file, TextEncoder(description), style)
            if _digest(records_file) == content:  # else it was replaced, and these are the new one's tokens
                _keep(tokens, kept)
                _tidy(records_file, start)
    return tokens


def _digest(records_file: Path) -> str:
    try:
        return file_digest(records_file)
    except OSError as error:
        raise DataError(f"{records_file}: cannot be read: {error.strerror}; make it before what needs it") from error


@lru_cache(maxsize=2)  # a large vocabulary takes a good part of a second, and every split asks for it
def _way(description: bytes, prompt_template: str) -> str:
    """SHA-256 in hex over all that decides the ids of a record, and nothing else.

    So a preset's tokenizer and the one in an archive made from it share their tokens, though
    transformers adds special tokens, padding and a post-processor to the latter.
    """
    way = [_FORMAT, tokenizers.__version__, template(prompt_template).text, TextEncoder(description).way]
    return hashlib.sha256(orjson.dumps(way, option=orjson.OPT_SORT_KEYS)).hexdigest()


@contextmanager
def _turn(records_file: Path) -> Iterator[None]:
    """Hold the lock of the split, which ends with this process at the latest."""
    with records_file.open("rb") as file:
        if os.access(records_file.parent, os.W_OK):  # else nothing is kept, and nobody need wait for it
            with suppress(OSError):  # a file system without locks: several may do the same work
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(kept: Path) -> Tokenized | None:
    """What is kept there, if it is whole: the checksums of its parts are in the file."""
    if not kept.is_file():
        return None
    try:
        with np.load(kept) as parts:
            return Tokenized(parts["ids"], parts["starts"], parts["prompts"])
    except Exception as error:  # a damaged file can raise anything; it is no more than a copy
        _log.warning("%s: is damaged (%s: %s) and is made anew", kept, type(error).__name__, error)
        return None


def _make(records_file: Path, encoder: TextEncoder, style: PromptTemplate) -> Tokenized:
    def encode(records: list[Record]) -> tuple[array[int], list[int]]:
        """The ids of some records, and how many each record and its prompt have, in turns."""
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


def _keep(tokens: Tokenized, kept: Path) -> None:
    try:
        with publish_file(kept) as path, path.open("wb") as file:
            np.savez(file, ids=tokens.ids, starts=tokens.starts, prompts=tokens.prompts)
    except OSError as error:
        _log.info("%s: the tokens are not kept: %s", kept.parent, error)


def _tidy(records_file: Path, start: str) -> None:
    """Remove the tokens of other contents of this split, and for its present one those of all but a few tokenizers."""
    digest = "?" * _HEX
    found = records_file.parent.glob(f".tokens-{glob.escape(records_file.stem)}-{digest}-{digest}.npz")
    with suppress(OSError):
        newest_first = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
        present = [path for path in newest_first if path.name.startswith(start)]
        for path in set(newest_first) - set(present[:_KEPT]):
            path.unlink()
