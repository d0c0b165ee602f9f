"""Hashes of texts, column by column: what decides on a record's split and its order.

They depend on content and a seed alone, never on a row's number, a process or a machine.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fedsft_assets.data.arrow import EMPTY, numpy_view

Hashes = npt.NDArray[np.uint64]


def text_hashes(texts: pa.Array) -> Hashes:
    """A hash of each text's bytes, uint64 [N]; a null counts as the empty text."""
    return byte_hashes(texts.fill_null(EMPTY).cast(pa.binary()).to_pylist())


def byte_hashes(values: Sequence[bytes]) -> Hashes:
    """A hash of each, uint64 [N]."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, values), np.uint64, len(values))


def prompt_hashes(prompts: pa.Array) -> Hashes:
    """A hash of each prompt's words, uint64 [N], without case, white space and order.

    Without order, because the same instruction and context may be joined either way round. Words are
    compared in lower case and Unicode's NFKD form.
    """
    if len(prompts) == 0:
        return np.zeros(0, np.uint64)
    # Trimmed, because splitting at white space reads past the end of a text that ends with some (pyarrow 25.0.1).
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(prompts))
    distinct = words.flatten().dictionary_encode()
    hashes = text_hashes(pc.utf8_lower(pc.utf8_normalize(distinct.dictionary, "NFKD")))
    # A prompt's hash is the sum of its words' hashes, modulo 2^64: a sum has no order.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes[numpy_view(distinct.indices, np.int32)])])
    ends = np.cumsum(numpy_view(pc.list_value_length(words), np.int32))
    return np.diff(sums[np.concatenate([[0], ends])])


def mixed(hashes: Hashes, seed: int, purpose: str) -> Hashes:
    """Independent uniform hashes for one purpose and seed, uint64 [N], of hashes that are equal for equal content.

    The finalizer of SplitMix64, see https://doi.org/10.1145/2714064.2660195
    """
    key = np.uint64(xxhash.xxh3_64_intdigest(f"{purpose} {seed}".encode()))
    mix = hashes ^ key
    mix = (mix ^ (mix >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mix = (mix ^ (mix >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mix ^ (mix >> np.uint64(31))


class Seen:
    """Hashes met so far, 8 bytes each. Two of a million different ones coincide once in 37 million times."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)

    def first(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which of these come for the first time, bool [N]; from now on all of them have been seen."""
        unique, index = np.unique(hashes, return_index=True)
        places = np.searchsorted(self._sorted, unique)
        inside = places < len(self._sorted)
        known = np.zeros(len(unique), bool)
        known[inside] = self._sorted[places[inside]] == unique[inside]
        first = np.zeros(len(hashes), bool)
        first[index[~known]] = True
        self._sorted = np.insert(self._sorted, places[~known], unique[~known])
        return first
