"""Makes the data benchmark's input: the real samples' rows repeated up to the published sizes.

Files have the published names, folders and columns, apart from three columns of OASST1 that the
samples lack and only the reference would read.
"""

import json
import sys
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.data_files import ALPACA, DOLLY, OASST1_TRAINING, OASST1_VALIDATION, PUBLISHED_ROWS

_ROW_GROUP = 1000  # as the hub's own writer makes them
_ID_COLUMNS = ("message_id", "parent_id", "message_tree_id")
_ID_KEPT = 28  # characters of an id that stay; the copy's number takes the place of the last eight

Change = Callable[[pa.Table, pa.Array, pa.Array], pa.Table]


def generate(samples: Path, folder: Path, scale: float) -> None:
    """Write `scale` times the published rows under `folder`, in bounded memory.

    Each text that becomes an input gets its row's number at the end, and so does each reply of OASST1:
    this project drops exact duplicates, so plain repetition would leave it less to write than the reference.
    """
    rows = {name: max(1, round(count * scale)) for name, count in PUBLISHED_ROWS.items()}
    for name in rows:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    _repeat_table(samples / ALPACA, folder / ALPACA, rows[ALPACA], _new_instruction)
    _repeat_lines(samples / DOLLY, folder / DOLLY, rows[DOLLY])
    for name in (OASST1_TRAINING, OASST1_VALIDATION):
        _repeat_table(samples / name, folder / name, rows[name], _new_message)


def _repeat_table(source: Path, target: Path, rows: int, change: Change) -> None:
    table = pq.read_table(source)
    with pq.ParquetWriter(target, table.schema) as writer:
        for start in range(0, rows, _ROW_GROUP):
            numbers = np.arange(start, min(start + _ROW_GROUP, rows))
            copies = pa.array([f"{copy:08x}" for copy in numbers // len(table)])
            part = table.take(numbers % len(table))
            writer.write_table(change(part, pa.array(numbers).cast(pa.string()), copies))


def _new_instruction(part: pa.Table, numbers: pa.Array, _copies: pa.Array) -> pa.Table:
    for name in ("instruction", "text"):
        part = _replaced(part, name, _numbered(part[name], numbers))
    return part


def _new_message(part: pa.Table, numbers: pa.Array, copies: pa.Array) -> pa.Table:
    """A tree's messages stay together and refer to each other: the same copy gives the same new ids."""
    for name in _ID_COLUMNS:
        kept = pc.utf8_slice_codeunits(part[name], 0, _ID_KEPT)
        part = _replaced(part, name, pc.binary_join_element_wise(kept, copies, ""))
    return _replaced(part, "text", _numbered(part["text"], numbers))


def _numbered(texts: pa.ChunkedArray, numbers: pa.Array) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(texts, numbers, " ")


def _replaced(table: pa.Table, name: str, column: pa.ChunkedArray) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, column)


def _repeat_lines(source: Path, target: Path, rows: int) -> None:
    with source.open() as lines, target.open("w") as file:
        samples = [json.loads(line) for line in lines]
        for number, row in enumerate(islice(cycle(samples), rows)):
            file.write(json.dumps({**row, "instruction": f"{row['instruction']} {number}"}) + "\n")


if __name__ == "__main__":
    generate(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
