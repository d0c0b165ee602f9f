"""Conversion between Python or NumPy values and Arrow arrays, without pandas.

`pa.array`, `to_numpy`, and compute functions given Python values import pandas on first use:
0.2 s and 40 MB per process, which nothing here needs.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Number = TypeVar("Number", bound=np.generic)


def texts(values: Sequence[str | None]) -> pa.StringArray:
    """Strings [N]; None becomes null. Raises AttributeError for other types, UnicodeEncodeError for lone surrogates."""
    encoded = [b"" if value is None else value.encode() for value in values]
    offsets = np.zeros(len(encoded) + 1, np.int32)
    np.cumsum(np.fromiter(map(len, encoded), np.int32, len(encoded)), out=offsets[1:])
    valid = None
    if None in values:
        valid = _bits(np.array([value is not None for value in values], bool))
    return pa.StringArray.from_buffers(len(encoded), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)), valid)


def flags(values: npt.NDArray[np.bool_]) -> pa.BooleanArray:
    """Booleans [N]."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])


def rows(values: npt.NDArray[np.int64]) -> pa.Int64Array:
    """Row numbers, int64 [N]."""
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values, np.int64))])


def numpy_flags(column: pa.BooleanArray) -> npt.NDArray[np.bool_]:
    """Booleans [N]; null becomes False."""
    return numpy_view(column.fill_null(_FALSE).cast(pa.uint8()), np.bool_)


def numpy_numbers(column: pa.Array) -> npt.NDArray[np.float64]:
    """Numbers, float64 [N]; null becomes NaN."""
    return numpy_view(column.cast(pa.float64()).fill_null(_NAN), np.float64)


def numpy_view(column: pa.Array, kind: type[Number]) -> npt.NDArray[Number]:
    """The values [N] of a column without nulls, without a copy; `kind` must have the byte layout of its type."""
    if len(column) == 0:
        return np.zeros(0, kind)
    return np.frombuffer(column.buffers()[1], kind)[column.offset : column.offset + len(column)]


def _bits(values: npt.NDArray[np.bool_]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


EMPTY, BLANK_LINE = texts(["", "\n\n"])
_FALSE = flags(np.zeros(1, bool))[0]
_NAN = pa.Array.from_buffers(pa.float64(), 1, [None, pa.py_buffer(np.array([np.nan]))])[0]
