"""Locations of the entries of an untrusted, uncompressed zip file, validated for reading in place."""

import os
import struct
import zipfile
from typing import BinaryIO

from fedsft_assets.model.archive.file_window import FileWindow
from fedsft_assets.model.archive.members import Member
from fedsft_assets.model.errors import ModelError

_MAX_DIRECTORY_BYTES = 64 << 20
_HEADER_BYTES = 30


def zip_entries(file: BinaryIO, where: str) -> dict[str, Member]:
    """All entries by name. Raises ModelError that begins with `where`.

    Compressed and encrypted entries, duplicate names, entries that overlap or whose header disagrees with the
    directory, and truncated files are refused.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        with zipfile.ZipFile(FileWindow(file, 0, size, max_read=_MAX_DIRECTORY_BYTES)) as archive:
            infos, end = archive.infolist(), archive.start_dir
    # zipfile raises NotImplementedError for a newer version of the format.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise ModelError(f"{where}: is truncated, or not a torch checkpoint: {error}") from error
    entries: dict[str, Member] = {}
    for info in infos:
        if info.filename in entries:
            raise ModelError(f"{where}: {info.filename!r} occurs twice")
        entries[info.filename] = _entry(file, info, end, where)
    previous_end = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.start):
        if entry.start < previous_end:
            raise ModelError(f"{where}: {entry.name!r} overlaps another entry")
        previous_end = entry.start + entry.size
    return entries


def _entry(file: BinaryIO, info: zipfile.ZipInfo, end: int, where: str) -> Member:
    """The location of an entry's bytes according to its own header, which must agree with the directory."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise ModelError(f"{where}: {info.filename!r} is compressed or encrypted; torch writes neither")
    if not 0 <= info.header_offset <= end - _HEADER_BYTES:
        raise ModelError(f"{where}: {info.filename!r} begins outside the file")
    file.seek(info.header_offset)
    header = file.read(_HEADER_BYTES)
    if len(header) < _HEADER_BYTES or header[:4] != b"PK\3\4":
        raise ModelError(f"{where}: {info.filename!r} is not where the directory says")
    name_length, extra_length = struct.unpack_from("<2H", header, 26)
    if file.read(name_length) != info.orig_filename.encode():
        raise ModelError(f"{where}: {info.filename!r} has another name in its own header")
    start = info.header_offset + _HEADER_BYTES + name_length + extra_length
    if start + info.file_size > end:
        raise ModelError(f"{where}: {info.filename!r} ends outside the file")
    return Member(info.filename, file, start, info.file_size)
