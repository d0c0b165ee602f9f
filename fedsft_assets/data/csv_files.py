"""Reading CSV files with a header, in batches."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pc

from fedsft_assets.data.examples import Examples, Rejected, from_bytes
from fedsft_assets.data.records import DataError, excerpt
from fedsft_assets.specs import ColumnsSpec

_BLOCK = 1 << 23  # no row can be longer


def read(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """The rows of a CSV file, numbered as a spreadsheet does: the header is row 1.

    Fields may hold line breaks inside quotes. A row with too many or too few fields is a rejected
    one. Raises DataError for a missing column or a file that is no CSV.
    """
    names = columns.names
    odd: list[pc.InvalidRow] = []

    def skip(row: pc.InvalidRow) -> str:
        odd.append(row)
        return "skip"

    numbers = _Numbers()
    try:
        with pc.open_csv(
            path,
            read_options=pc.ReadOptions(use_threads=False, block_size=_BLOCK),
            parse_options=pc.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
            convert_options=pc.ConvertOptions(
                column_types=dict.fromkeys(names, pa.binary()), include_columns=names, strings_can_be_null=False
            ),
        ) as reader:
            for batch in reader:
                rejected = [
                    Rejected(
                        path.name,
                        row.number,
                        f"expected {row.expected_columns} fields, found {row.actual_columns}",
                        excerpt(row.text),
                    )
                    for row in odd
                ]
                rows = numbers.of(len(batch), [row.number for row in odd])
                odd.clear()
                yield from_bytes(path.name, rows, {name: batch.column(name) for name in names}, columns, rejected)
    except pa.ArrowKeyError as error:
        raise DataError(f"{path}: {_missing(path, names)}; name the file's own columns") from error
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: is not a CSV file with a header ({reason}); repair the file") from error


class _Numbers:
    """Numbers rows that were read, leaving out those that were skipped."""

    def __init__(self) -> None:
        self._next = 2
        self._skipped: set[int] = set()

    def of(self, count: int, skipped: list[int]) -> npt.NDArray[np.int64]:
        self._skipped.update(skipped)
        last = self._next + count + len(self._skipped)
        free = [number for number in range(self._next, last) if number not in self._skipped][:count]
        if free:
            self._next = free[-1] + 1
            self._skipped = {number for number in self._skipped if number >= self._next}
        return np.array(free, np.int64)


def _missing(path: Path, names: list[str]) -> str:
    with path.open("rb") as file:
        header = file.readline().decode(errors="replace").strip()
    columns = [name.strip().strip('"').lstrip("\ufeff") for name in header.split(",")]
    return f"column {', '.join(name for name in names if name not in columns)}: is missing, found {excerpt(header)}"
