"""Hashes of texts: functions of content alone, the same for ever."""

import random
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from fedsft_assets.data.hashing import Seen, mixed, prompt_hashes, text_hashes

_PIECES = ["a", "É", "日本", " ", "\n", "\n\n", "\u3000", "\u00a0", "ﬁ", "x y", "İ", "ß", ".", "𝔘"]


def _expected(prompt: str) -> int:
    """The sum of the words' hashes, one word after the other."""
    words = [unicodedata.normalize("NFKD", word).lower() for word in prompt.split()]
    return sum(xxhash.xxh3_64_intdigest(word.encode()) for word in words) % 2**64


def test_a_prompt_is_the_sum_of_its_words_whatever_surrounds_it_in_memory() -> None:
    """Prompts end batches in all kinds of white space, next to whatever memory was left there."""
    rng = random.Random(7)
    for _ in range(2000):
        prompts = ["".join(rng.choices(_PIECES, k=rng.randrange(1, 12))) + "x" for _ in range(rng.randrange(1, 6))]
        prompts[-1] += rng.choice(["", " ", "\n\n", "\u3000"])
        left_behind = [rng.randbytes(64 * rng.randrange(1, 40)) for _ in range(5)]
        del left_behind
        assert prompt_hashes(pa.array(prompts)).tolist() == [_expected(prompt) for prompt in prompts], prompts


def test_case_white_space_and_order_do_not_matter_and_words_do() -> None:
    same = ["Add 4.\n\nTo 5.", "to 5.  ADD\t4.", "\u3000TO 5. Add 4. "]
    other = ["Add 4. To 5. To", "Add 4 To 5.", ""]
    hashes = prompt_hashes(pa.array(same + other)).tolist()
    assert len(set(hashes[:3])) == 1
    assert len(set(hashes)) == 4
    assert prompt_hashes(pa.array([], pa.string())).tolist() == []


def test_hashes_are_the_same_for_ever() -> None:
    assert text_hashes(pa.array(["", "ü"])).tolist() == [3244421341483603138, 6748675957732712302]
    assert mixed(np.array([0, 1], np.uint64), 1234, "split").tolist() == [13242600188892722751, 1837901559357901918]


def test_purposes_and_seeds_are_independent() -> None:
    hashes = np.arange(10_000, dtype=np.uint64)
    halves = [
        mixed(hashes, seed, purpose) >> np.uint64(63) == 1
        for seed, purpose in ((1, "split"), (2, "split"), (1, "order"))
    ]
    for one in halves:
        assert one.mean() == pytest.approx(0.5, abs=0.02)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (halves[one] == halves[other]).mean() == pytest.approx(0.5, abs=0.02)


def test_seen_tells_the_first_of_each() -> None:
    rng = np.random.default_rng(3)
    seen, known = Seen(), set()
    for _ in range(30):
        hashes = rng.integers(0, 300, 40).astype(np.uint64)
        expected = []
        for value in hashes.tolist():
            expected.append(value not in known)
            known.add(value)
        assert seen.first(hashes).tolist() == expected
