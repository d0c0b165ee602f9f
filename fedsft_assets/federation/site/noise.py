"""Gaussian noise that nobody can foresee, and that does not tell what it was added to.

Its bits are AES-256 in counter mode under a key of the operating system's that nobody ever sees: no seed can be
tried. Sums are of whole numbers of steps, 2^-17 to 2^-16 standard deviations, whatever is blurred: floats that
come as they do have gaps that give away what was added to them (Mironov, On Significance of the Least Significant
Bits for Differential Privacy, 2012).
"""

import math
import secrets
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_KEY_BYTES = 32
_BLOCK = 1 << 15  # numbers at a time: what stays in a core's cache, and what torch does in one thread
_STEP_BITS = 16
_UNSIGNED = (1 << 63) - 1  # torch shifts and converts signed integers only
_SCARCE = 1 << 47  # a uniform number below this, of 63 bits, gets 63 bits more: the far tails are made of these


def add_noise(tensors: Iterable[torch.Tensor], scale: float, deviation: float) -> None:
    """Multiply all numbers by `scale`, in place, and add Gaussian noise of that standard deviation to each.

    Before the noise, a number is rounded towards zero to whole steps, which makes no norm larger. What comes out is
    what a Gaussian of real numbers, added to these, would be when it is rounded to whole steps, and only then to the
    tensor's type: rounding after the noise tells nothing. A step is the power of two, times 2^-16, that is next below
    the deviation. Tensors may be on any device; noise is made on the CPU, in as many threads as torch uses.
    """
    step = math.ldexp(1.0, math.frexp(deviation)[1] - 1 - _STEP_BITS)
    blocks = _Shared(_blocks(tensors))

    def work() -> None:
        stream = NoiseStream(deviation / step)
        for block in blocks:
            stream.add_to(block, scale, step)

    threads = torch.get_num_threads()
    try:
        # One thread in each: else MKL would share out every logarithm among all cores once more.
        with ThreadPoolExecutor(threads, "noise", torch.set_num_threads, (1,)) as pool:
            for done in [pool.submit(work) for _ in range(threads)]:
                done.result()
    finally:
        torch.set_num_threads(threads)  # for threads that are yet to come


class NoiseStream:
    """Whole numbers of steps, each a Gaussian that is rounded to the nearest; `deviation` is in steps.

    Box and Muller's transformation in float64, of 63 bits for the angle and 63 for the radius, 126 where it is
    large: it reaches 13 deviations, beyond which a Gaussian is once in 10^38 numbers.
    """

    def __init__(self, deviation: float) -> None:
        key = algorithms.AES(secrets.token_bytes(_KEY_BYTES))
        self._bits = Cipher(key, modes.CTR(bytes(16))).encryptor()  # a key is used for one stream, which begins at 0
        self._deviation = deviation
        self._zeros, self._buffer = bytes(8 * _BLOCK), bytearray(8 * _BLOCK)
        self._random = torch.frombuffer(self._buffer, dtype=torch.int64).view(2, -1)
        self._pairs = torch.empty(2, _BLOCK // 2, dtype=torch.float64)
        self._radius, self._angle = torch.empty_like(self._pairs)
        self._noise, self._whole = torch.empty(2, _BLOCK, dtype=torch.int64)
        self._numbers = torch.empty(_BLOCK, dtype=torch.float64)
        self._taken = _BLOCK

    def add_to(self, block: torch.Tensor, scale: float, step: float) -> None:
        """Make the noisy multiple of the numbers, of which there are `_BLOCK` at most, as `add_noise` has it."""
        numbers, whole = self._numbers[: len(block)], self._whole[: len(block)]
        whole.copy_(numbers.copy_(block).mul_(scale / step))  # which rounds towards zero
        block.copy_(numbers.copy_(whole.add_(self.take(len(block)))).mul_(step))

    def take(self, count: int) -> torch.Tensor:
        """The next ones, int64 [count], of which there are `_BLOCK` at most; they are there until the next call."""
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
    """What several threads take from, each block going to one of them."""

    def __init__(self, blocks: Iterator[torch.Tensor]) -> None:
        self._blocks, self._lock = blocks, threading.Lock()

    def __next__(self) -> torch.Tensor:
        with self._lock:
            return next(self._blocks)


def _blocks(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    for tensor in tensors:
        yield from tensor.view(-1).split(_BLOCK)
