"""Following a file that grows: every whole line once, in order."""

from pathlib import Path

from fedsft_assets.federation.protocol.tail import Tail


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def test_each_line_is_handed_out_once(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    _append(path, b"one\ntwo\n")
    assert tail.new_lines() == ["one", "two"]
    assert tail.new_lines() == []
    _append(path, b"\nthree\n")
    assert tail.new_lines() == ["", "three"]


def test_unfinished_line_waits_for_its_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    _append(path, b"one\ntw")
    assert tail.new_lines() == ["one"]
    _append(path, b"o")
    assert tail.new_lines() == []
    _append(path, b"\n")
    assert tail.new_lines() == ["two"]


def test_room_for_a_line_that_was_not_written_yet_is_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    path.write_bytes(b"one\n" + bytes(4) + b"three\n")  # as a reader sees it that is overtaken by the writer
    assert tail.new_lines() == ["one"]
    path.write_bytes(b"one\ntwo\nthree\n")
    assert tail.new_lines() == ["two", "three"]


def test_character_cut_in_the_middle_by_the_writer_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    tail = Tail(path)
    content = "site-1 · round\n".encode()
    cut = content.index("·".encode()) + 1
    _append(path, content[:cut])
    assert tail.new_lines() == []
    _append(path, content[cut:])
    assert tail.new_lines() == ["site-1 · round"]


def test_bytes_that_are_no_text_do_not_stop_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _append(path, b"\xff\xfe\nnext\n")
    assert Tail(path).new_lines() == ["\ufffd\ufffd", "next"]
    assert Tail(path).end(1) == "next"


def test_file_that_is_not_there_yet_has_no_lines(tmp_path: Path) -> None:
    path = tmp_path / "later" / "log"
    tail = Tail(path)
    assert (tail.new_lines(), tail.end(5)) == ([], "")
    path.parent.mkdir()
    _append(path, b"one\n")
    assert tail.new_lines() == ["one"]


def test_end_is_the_last_lines_also_an_unfinished_one(tmp_path: Path) -> None:
    path = tmp_path / "log"
    _append(path, b"one\ntwo\nthree\nfou")
    tail = Tail(path)
    tail.new_lines()
    assert tail.end(2) == "three\nfou"
    assert tail.end(10) == "one\ntwo\nthree\nfou"
