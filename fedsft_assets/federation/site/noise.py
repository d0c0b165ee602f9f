"""Cryptographically secure Gaussian noise that does not leak what it was added to.

Random bits come from AES-256 in counter mode under a fresh key from the operating system, so there is no seed to guess.
Values and noise are added as integer multiples of a step of 2^-17 to 2^-16 standard deviations: the uneven gaps between
floats would leak the value under the noise (Mironov, On Significance of the Least Significant Bits for Differential
Privacy, 2012).
"""

import math
import secrets
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_KEY_BYTES = 32
_BLOCK = 1 << 15  # elements at a time: fits in a core's cache, and torch uses one thread
_STEP_BITS = 16
_UNSIGNED = (1 << 63) - 1  # torch only shifts and converts signed integers
_SCARCE = 1 << 47  # 63-bit uniforms below this get 63 more bits: they produce the far tails


def add_noise(tensors: Iterable[torch.Tensor], scale: float, deviation: float) -> None:
    """Multiply all elements by `scale`, in place, and add Gaussian noise with standard deviation `deviation`.

    Before noise is added, values are rounded towards zero to multiples of the step, which never increases a norm. The
    result is distributed as a real-valued Gaussian sum rounded to the step, and then to the tensor's dtype; rounding
    after the noise leaks nothing. The step is 2^-16 times the largest power of two not above the deviation. Tensors may
    be on any device; noise is generated on the CPU with as many threads as torch uses.
    """
    step = math.ldexp(1.0, math.frexp(deviation)[1] - 1 - _STEP_BITS)
    blocks = _Shared(_blocks(tensors))

    def work() -> None:
        stream = NoiseStream(deviation / step)
        for block in blocks:
            stream.add_to(block, scale, step)

    threads = torch.get_num_threads()
    try:
        # One torch thread per worker: otherwise MKL would parallelize each logarithm over all cores again.
        with ThreadPoolExecutor(threads, "noise", torch.set_num_threads, (1,)) as pool:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # for threads started later


class NoiseStream:
    """A stream of Gaussian samples rounded to integers; `deviation` is in steps.

    Uses the Box-Muller transform in float64, with 63 random bits for the angle and 63 for the radius, or 126 if it is
    large: reaches 13 standard deviations, which a Gaussian exceeds once in 10^38 samples.
    """

    def __init__(self, deviation: float) -> None:
        key = algorithms.AES(secrets.token_bytes(_KEY_BYTES))
        self._bits = Cipher(key, modes.CTR(bytes(16))).encryptor()  # one stream per key, so the counter may start at 0
        self._deviation = deviation
        self._zeros, self._buffer = bytes(8 * _BLOCK), bytearray(8 * _BLOCK)
        self._random = torch.frombuffer(self._buffer, dtype=torch.int64).view(2, -1)
        self._pairs = torch.empty(2, _BLOCK // 2, dtype=torch.float64)
        self._radius, self._angle = torch.empty_like(self._pairs)
        self._noise, self._whole = torch.empty(2, _BLOCK, dtype=torch.int64)
        self._numbers = torch.empty(_BLOCK, dtype=torch.float64)
        self._taken = _BLOCK

    def add_to(self, block: torch.Tensor, scale: float, step: float) -> None:
        """Scale and add noise to at most `_BLOCK` elements in place, as `add_noise` describes."""
        numbers, whole = self._numbers[: len(block)], self._whole[: len(block)]
        whole.copy_(numbers.copy_(block).mul_(scale / step))  # rounds towards zero
        block.copy_(numbers.copy_(whole.add_(self.take(len(block)))).mul_(step))

    def take(self, count: int) -> torch.Tensor:
        """The next `count` samples (at most `_BLOCK`), int64 [count]; valid until the next call."""
        if self._taken + count > _BLOCK:
            self._draw()
            self._taken = 0
        self._taken += count
        return self._noise[self._taken - count : self._taken]

    def _draw(self) -> None:
        self._bits.update_into(self._zeros, self._buffer)
        radius, angle = self._random.bitwise_and_(_UNSIGNED)
        self._angle.copy_(angle).mul_(2 * math.pi * 2.0**-63)
        torch.cos(self._angle, out=self._pairs[0])
        torch.sin(self._angle, out=self._pairs[1])
        self._radius.copy_(radius)
        if radius.min() < _SCARCE:
            few = (radius < _SCARCE).nonzero().squeeze(1)
            more = torch.frombuffer(bytearray(self._bits.update(bytes(8 * len(few)))), dtype=torch.int64)
            self._radius[few] += more.bitwise_and_(_UNSIGNED).to(torch.float64).mul_(2.0**-63).clamp_min_(2.0**-64)
        self._radius.mul_(2.0**-63).log_().mul_(-2 * self._deviation**2).sqrt_()
        self._noise.copy_(self._pairs.mul_(self._radius).round_().view(-1))


class _Shared(Iterator[torch.Tensor]):
    """A thread-safe iterator: each block goes to one thread."""

    def __init__(self, blocks: Iterator[torch.Tensor]) -> None:
        self._blocks, self._lock = blocks, threading.Lock()

    def __next__(self) -> torch.Tensor:
        with self._lock:
            return next(self._blocks)


def _blocks(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        yield from tensor.view(-1).split(_BLOCK)
