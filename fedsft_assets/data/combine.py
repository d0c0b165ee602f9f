"""The shuffled union of several datasets' splits, in bounded memory.

A record's position is determined by a hash of its line and a seed. Lines stay on disk: memory holds
24 bytes for each, its hash and location.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedsft_assets.data.hashing import Hashes, byte_hashes, mixed
from fedsft_assets.data.records import DataError
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.files import HashedFile, file_digest, publish_folder
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.store import SPLITS, split_file

_BLOCK = 1 << 21  # bytes of lines to read at a time
_LINES = 4096  # lines to write at a time


def combine(folders: Sequence[Path], into: Path) -> SplitReport:
    """Write the shuffled union of several datasets' splits to `into`, atomically.

    The order depends only on the seed and the records: reordering `folders` changes nothing, and new
    records do not reorder existing ones. Exact duplicates are dropped and counted. Raises DataError if a
    split is missing, has changed since it was written, or was made with different split settings.
    """
    reports = [SplitReport.read(folder) for folder in folders]
    settings = reports[0].settings
    for folder, report in zip(folders, reports, strict=True):
        for field in ("seed", "proportions"):
            ours, expected = getattr(report.settings, field), getattr(settings, field)
            if ours != expected:
                raise DataError(
                    f"{folder}: was split with {field} {ours}, {folders[0]} with {expected}, so a prompt may be in "
                    "several splits; materialize all processed assets with the same settings"
                )
    counts, digests = {}, {}
    with publish_folder(into) as fresh:
        for split in SPLITS:
            paths = [split_file(folder, split) for folder in folders]
            into_file = split_file(fresh, split)
            counts[split], digests[into_file.name] = _shuffle(paths, reports, into_file, settings.seed)
        rows = sum(report.records for report in reports)
        report = SplitReport.of(
            COMBINED,
            digests,
            settings,
            counts=counts,
            rows=rows,
            duplicates=rows - sum(counts.values()),
            parts={report.name: folder.name for folder, report in zip(folders, reports, strict=True)},
        )
        report.write(fresh)
    return report


def _shuffle(paths: Sequence[Path], reports: Sequence[SplitReport], into: Path, seed: int) -> tuple[int, str]:
    """Write the distinct lines of all files to `into` in hash order; return their number and digest."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        digests = pool.map(file_digest, paths)
        indexes = [_index(path, seed) for path in paths]
        for path, report, digest in zip(paths, reports, digests, strict=True):
            if digest != report.files[path.name]:
                raise DataError(f"{path}: has changed since it was written; materialize processed/{report.name} again")
    _, order = np.unique(np.concatenate([hashes for hashes, _ in indexes]), return_index=True)
    files = np.repeat(np.arange(len(paths)), [len(hashes) for hashes, _ in indexes])
    starts = np.concatenate([ends[:-1] for _, ends in indexes])
    lengths = np.concatenate([np.diff(ends) for _, ends in indexes])
    with ExitStack() as stack, HashedFile(into) as out:
        handles = [os.open(path, os.O_RDONLY) for path in paths]
        for handle in handles:
            stack.callback(os.close, handle)
        for first in range(0, len(order), _LINES):
            part = order[first : first + _LINES]
            locations = zip(files[part].tolist(), lengths[part].tolist(), starts[part].tolist(), strict=True)
            out.write(b"".join([os.pread(handles[file], length, start) for file, length, start in locations]))
    return len(order), out.digest


def _index(path: Path, seed: int) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The hash of each of a file's N lines [N], and the line boundaries in bytes, starting with 0 [N + 1]."""
    hashes, lengths = [np.zeros(0, np.uint64)], [np.zeros(1, np.int64)]
    try:
        with path.open("rb") as file:
            while lines := file.readlines(_BLOCK):
                hashes.append(mixed(byte_hashes(lines), seed, "shuffle"))
                lengths.append(np.fromiter(map(len, lines), np.int64, len(lines)))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; materialize the asset again") from error
    return np.concatenate(hashes), np.cumsum(np.concatenate(lengths))
