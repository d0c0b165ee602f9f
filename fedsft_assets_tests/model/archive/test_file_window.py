"""A window shows its part of a file and nothing else, however it is asked."""

import io
import os
import tarfile
import zipfile

import pytest

from fedsft_assets.model.archive.file_window import FileWindow


def test_only_the_part_is_seen():
    window = FileWindow(io.BytesIO(b"0123456789"), 3, 4)
    assert window.read() == b"3456"
    assert window.read() == b""
    assert window.seek(-2, os.SEEK_END) == 2
    assert window.read(10) == b"56"
    assert window.seek(1) == 1
    assert window.seek(1, os.SEEK_CUR) == window.tell() == 2
    buffer = bytearray(b"????")
    assert window.readinto(buffer) == 2
    assert buffer == b"56??"
    window.seek(100)
    assert window.read() == b""
    with pytest.raises(ValueError, match="before the beginning"):
        window.seek(-1)


def test_windows_of_one_file_do_not_disturb_each_other():
    file = io.BytesIO(b"abcdef")
    one, other = FileWindow(file, 0, 3), FileWindow(file, 3, 3)
    assert [one.read(1), other.read(1), one.read(1), other.read(1)] == [b"a", b"d", b"b", b"e"]


def test_no_more_memory_is_taken_than_allowed():
    window = FileWindow(io.BytesIO(b"x" * 100), 0, 100, max_read=10)
    assert window.read(10) == b"x" * 10
    with pytest.raises(ValueError, match="90 bytes at once are more than 10"):
        window.read()
    with pytest.raises(ValueError, match="11 bytes at once"):
        window.read(11)


def test_a_file_shorter_than_the_window_ends_where_it_ends():
    assert FileWindow(io.BytesIO(b"abc"), 1, 10).read() == b"bc"


def test_archives_in_archives_are_read_through_windows():
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("name", "content")
    outer = io.BytesIO()
    with tarfile.open(fileobj=outer, mode="w") as tar:
        entry = tarfile.TarInfo("inner.zip")
        entry.size = len(inner.getvalue())
        tar.addfile(entry, io.BytesIO(inner.getvalue()))
    with tarfile.open(fileobj=FileWindow(outer, 0, len(outer.getvalue()))) as tar:
        member = tar.getmember("inner.zip")
    with zipfile.ZipFile(FileWindow(outer, member.offset_data, member.size)) as archive:
        assert archive.read("name") == b"content"
