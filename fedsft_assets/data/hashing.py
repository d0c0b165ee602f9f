"""Hashes of text columns, which determine a record's split and order.

They depend only on content and a seed, never on row number, process or machine.
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
    """A hash of each text's bytes, uint64 [N]; null counts as an empty text."""
    return byte_hashes(texts.fill_null(EMPTY).cast(pa.binary()).to_pylist())


def byte_hashes(values: Sequence[bytes]) -> Hashes:
    """The XXH3 hash of each value, uint64 [N]."""
    return np.fromiter(map(xxhash.xxh3_64_intdigest, values), np.uint64, len(values))


def prompt_hashes(prompts: pa.Array) -> Hashes:
    """A hash of each prompt's words, uint64 [N], ignoring case, white space and word order.

    Order is ignored because instruction and context may be joined either way round. Words are compared
    in lower case and Unicode's NFKD form.
    """
    if len(prompts) == 0:
        return np.zeros(0, np.uint64)
    # Trimmed, because utf8_split_whitespace reads past the end of a text with trailing white space (pyarrow 25.0.1).
    words = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(prompts))
    distinct = words.flatten().dictionary_encode()
    hashes = text_hashes(pc.utf8_lower(pc.utf8_normalize(distinct.dictionary, "NFKD")))
    # A prompt's hash is the sum of its words' hashes, modulo 2^64: independent of their order.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(hashes[numpy_view(distinct.indices, np.int32)])])
    ends = np.cumsum(numpy_view(pc.list_value_length(words), np.int32))
    return np.diff(sums[np.concatenate([[0], ends])])


def mixed(hashes: Hashes, seed: int, purpose: str) -> Hashes:
    """Derive hashes that are uniform and independent for each purpose and seed, uint64 [N], from content hashes [N].

    Uses the finalizer of SplitMix64, see https://doi.org/10.1145/2714064.2660195
    """
    key = np.uint64(xxhash.xxh3_64_intdigest(f"{purpose} {seed}".encode()))
    mix = hashes ^ key
    mix = (mix ^ (mix >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mix = (mix ^ (mix >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mix ^ (mix >> np.uint64(31))


class Seen:
    """The hashes seen so far, 8 bytes each. Among a million, a collision has a probability of 1 in 37 million."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)

    def first(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Which hashes occur for the first time, bool [N]; marks all of them as seen."""
        unique, index = np.unique(hashes, return_index=True)
        positions = np.searchsorted(self._sorted, unique)
        inside = positions < len(self._sorted)
        known = np.zeros(len(unique), bool)
        known[inside] = self._sorted[positions[inside]] == unique[inside]
        first = np.zeros(len(hashes), bool)
        first[index[~known]] = True
        self._sorted = np.insert(self._sorted, positions[~known], unique[~known])
        return first
