"""Detection of a file's actual kind from its first and last bytes."""

from pathlib import Path

from fedsft_assets.data.records import DataError, excerpt
from fedsft_assets.specs.dataset import DataFormat

_BEGINNINGS = {
    b"\x1f\x8b": ("compressed with gzip", "unpack it"),
    b"BZh91AY&SY": ("compressed with bzip2", "unpack it"),
    b"\xfd7zXZ": ("compressed with xz", "unpack it"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unpack it"),
    b"PK\x03\x04": ("a ZIP archive or an Excel workbook", "unpack it, or save it as CSV"),
    b"\xff\xfe": ("text in UTF-16", "save it as UTF-8"),
    b"\xfe\xff": ("text in UTF-16", "save it as UTF-8"),
    b"PAR1\x15": ("a Parquet file", "set 'format: parquet'"),  # with the first byte of a page header
    b"ARROW1\0\0": ("an Arrow file", "save it as Parquet"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "save it as Parquet"),
}
_SHOWN = 40  # bytes to read and show in messages; more than any signature has


def require_kind(path: Path, format: DataFormat) -> None:
    """Raise DataError for a file that is missing, empty, of another kind, or padded with zeros."""
    if not path.is_file():
        raise DataError(f"{path}: is missing; put the published file there")
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: is empty; download it again")
    with path.open("rb") as file:
        beginning = file.read(_SHOWN)
        file.seek(max(0, size - 2))
        end = file.read()
    kind, advice = next(
        (known for signature, known in _BEGINNINGS.items() if beginning.startswith(signature)), (None, "")
    )
    if format in ("parquet", "oasst1"):
        if not beginning.startswith(b"PAR1"):
            raise DataError(
                f"{path}: is not a Parquet file, found {kind or excerpt(beginning)!r}; use the file as published, "
                "or set format to match it"
            )
        return
    if kind:
        raise DataError(f"{path}: is {kind}, expected {format}; {advice}")
    if end == b"\0\0":
        raise DataError(f"{path}: ends in zero bytes, {format} never does: it is incomplete; download it again")
