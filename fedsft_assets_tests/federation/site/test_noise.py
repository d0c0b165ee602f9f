"""The noise itself: which bits it is made of, how it is distributed, and that it tells nothing of what it blurs."""

import math
import secrets
from collections.abc import Iterator
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import kstest, norm

from fedsft_assets.federation.site import noise
from fedsft_assets.federation.site.noise import NoiseStream, add_noise

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _drawn(stream: NoiseStream, count: int) -> torch.Tensor:
    return torch.cat([stream.take(part).clone() for part in [1 << 15] * (count >> 15)])


def _with_key(monkeypatch: pytest.MonkeyPatch, key: bytes) -> torch.Tensor:
    monkeypatch.setattr(secrets, "token_bytes", lambda count: key[:count])
    return NoiseStream(2.0**16).take(64).clone()


def test_each_of_the_256_bits_of_the_key_makes_other_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    first = _with_key(monkeypatch, KEY)
    assert torch.equal(_with_key(monkeypatch, KEY), first)
    for bit in range(256):
        flipped = (int.from_bytes(KEY, "big") ^ (1 << bit)).to_bytes(32, "big")
        assert (_with_key(monkeypatch, flipped) == first).sum() < 4, bit


def test_no_generator_of_torchs_or_pythons_and_no_seed_has_a_part_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda _: 5)
    drawn = []
    for _ in range(2):
        torch.manual_seed(5)
        numbers = torch.zeros(16)
        add_noise([numbers], 1.0, 1.0)
        drawn.append(numbers)
    assert not torch.equal(*drawn)
    for seed in range(64):
        tried = torch.empty(16).normal_(generator=torch.Generator().manual_seed(seed))
        assert all((numbers - tried).abs().max() > 0.1 for numbers in drawn)


def test_noise_is_gaussian() -> None:
    numbers = _drawn(NoiseStream(2.0**16), 1 << 20).double().div(2.0**16).numpy()
    assert kstest(numbers, "norm").pvalue > 1e-4
    for bound in (2.0, 3.0, 4.0):
        expected = 2 * norm.sf(bound) * len(numbers)
        assert abs((abs(numbers) > bound).sum() - expected) < 5 * math.sqrt(expected)
    halves = numbers.reshape(-1, 2, 1 << 14)  # both of a pair come from the same bits
    for one, other in ((halves[:, 0], halves[:, 1]), (halves[:, 0] ** 2, halves[:, 1] ** 2)):
        centred = (one - one.mean()).ravel() @ (other - other.mean()).ravel()
        assert abs(centred / (one.size * one.std() * other.std())) < 5 / math.sqrt(one.size)


class _Bits:
    """In place of the cipher: these 64-bit words, first for pairs and then for what is too small."""

    def __init__(self, first: int, then: int) -> None:
        self._first, self._then = first.to_bytes(8, "little"), then.to_bytes(8, "little")

    def update_into(self, _: bytes, into: bytearray) -> None:
        into[:] = self._first * (len(into) // 2 // 8) + bytes(len(into) // 2)  # an angle of 0: all radius

    def update(self, data: bytes) -> bytes:
        return self._then * (len(data) // 8)


@pytest.mark.parametrize(
    ("first", "then", "uniform"),
    [
        (0, 0, 2.0**-127),  # the smallest there is: 13.3 deviations
        (0, 1 << 62, 2.0**-64),
        (1, 1 << 62, 1.5 * 2.0**-63),
        ((1 << 46) + 1, 3 << 61, ((1 << 46) + 1.75) * 2.0**-63),
        (1 << 47, 1 << 62, 2.0**-16),  # large enough without more
        ((1 << 64) - 1, 0, 1.0),
    ],
)
def test_small_uniform_numbers_which_far_tails_are_made_of_get_more_bits(
    monkeypatch: pytest.MonkeyPatch, first: int, then: int, uniform: float
) -> None:
    monkeypatch.setattr(noise, "Cipher", lambda *_: SimpleNamespace(encryptor=lambda: _Bits(first, then)))
    assert NoiseStream(2.0**44).take(1).item() / 2.0**44 == pytest.approx(math.sqrt(-2 * math.log(uniform)), abs=1e-13)


@pytest.mark.parametrize("deviation", [0.7, 1.0, 1.9, 3e-7])
def test_what_comes_out_is_whole_steps_whatever_goes_in(deviation: float) -> None:
    step = 2.0 ** (math.floor(math.log2(deviation)) - 16)
    for change in (0.0, 1e-9, 0.1, -1 / 3, 1e-300, -5e-324):
        numbers = torch.full((1000,), change * deviation, dtype=torch.float64)
        add_noise([numbers], 1.0, deviation)
        steps = numbers / step
        assert torch.equal(steps, steps.round())
        assert not torch.signbit(numbers[numbers == 0]).any()  # nor does a zero tell its sign


def test_numbers_that_are_the_same_in_whole_steps_come_out_the_same_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(secrets, "token_bytes", lambda count: KEY[:count])
    given = [torch.full((4096,), value) for value in (0.0, -0.0, 2.0**-17, -(2.0**-17), 1e-30)]
    for numbers in given:
        add_noise([numbers], 1.0, 1.0)  # in steps of 2^-16
    assert all(torch.equal(numbers.view(torch.int32), given[0].view(torch.int32)) for numbers in given)


def test_rounding_before_the_noise_makes_no_number_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseStream, "take", lambda _, count: torch.zeros(count, dtype=torch.int64))
    before = torch.randn(10_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e-3
    after = before.clone()
    add_noise([after], 0.5, 1.0)
    assert (after.abs() <= before.abs() / 2).all()
    assert (after - before / 2).abs().max() < 2.0**-16


def test_every_number_of_every_tensor_gets_noise_of_its_own_in_any_number_of_threads() -> None:
    torch.set_num_threads(3)
    tensors = [torch.zeros(shape) for shape in ((300, 700), (1,), (7, 5), (100_000,))]
    add_noise(tensors, 1.0, 1.0)
    everything = torch.cat([tensor.view(-1) for tensor in tensors])
    later: list[int] = []
    thread = Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *later] == [3, 3]
    assert everything.std().item() == pytest.approx(1.0, rel=0.02)
    parts = everything[: len(everything) // 4 * 4].view(-1, 4)
    assert len(parts.unique(dim=0)) == len(parts)
