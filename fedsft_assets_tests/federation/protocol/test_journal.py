"""The journal of a job: durable, each point once, handed out in whole lines."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.journal import (
    Entry,
    EntryError,
    Finished,
    Journal,
    Missed,
    Progress,
    RoundDone,
    Started,
    Stopped,
    from_line,
    to_line,
)
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets_tests.small_disk import fill, small_disk, why_not

POINT = Point("train_loss", 1e-9, 3, 480, "site-1", 7, 1234)
ENTRIES: list[Entry] = [
    Point("val_loss", 7.178342342, 0, 0),
    POINT,
    Point("val_loss_local", math.inf, 3, 480, "site-é"),
    Progress('site-1 · "é" \\ \u2028 \x85 end\nof it\r\n'),
    Missed("site-2", 3, "its trainer failed", "Traceback:\n\tValueError: é"),
    Missed("site-2", 3, "disconnected"),
    RoundDone(3),
    Started(2),
    Stopped("round 3 has results of 1 of 2 sites", lost_sites=True),
    Finished(),
]
_LATER = '{"entry": "round", "round": 3, "of_a_later_version": 1}'
BIG = 1 << 20  # bytes that are handed out at a time


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.jsonl"


def _entries(path: Path) -> list[Entry]:
    return [from_line(line) for line in path.read_bytes().decode().split("\n")[:-1]]


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: type(entry).__name__)
def test_entry_is_the_same_after_a_trip_through_its_line(entry: Entry) -> None:
    line = to_line(entry)
    assert line.endswith("\n")
    assert line.splitlines() == [line[:-1]]
    assert from_line(line) == from_line(line[:-1]) == entry


def test_time_of_a_point_is_kept_in_its_line() -> None:
    assert from_line(to_line(replace(POINT, time=12.5))).time == 12.5  # type: ignore[union-attr]


def test_loss_that_is_no_number_comes_back_as_it_was() -> None:
    assert math.isnan(from_line(to_line(replace(POINT, value=math.nan))).value)  # type: ignore[union-attr]


@pytest.mark.parametrize("line", ["", "Traceback\n", "{", "3", "[]", '{"round": 3}', '{"entry": "x"}', _LATER])
def test_line_that_is_no_entry_is_an_error_that_shows_it(line: str) -> None:
    with pytest.raises(EntryError) as error:
        from_line(line)
    assert str(error.value) == f"expected an entry of a job's journal, found {line!r}"


def test_journal_with_a_line_that_is_no_entry_is_named_and_left_as_it_is(path: Path) -> None:
    Journal(path).add(ENTRIES[:1])
    with path.open("a") as file:
        file.write("spilt\n")
    found = path.read_bytes()
    with pytest.raises(EntryError) as error:
        Journal(path)
    assert str(error.value) == (
        f"{path}, line 2: expected an entry of a job's journal, found 'spilt'; remove the file and run the job again"
    )
    assert path.read_bytes() == found


def test_entries_are_there_in_the_order_in_which_they_were_added(path: Path) -> None:
    journal = Journal(path)
    journal.add(ENTRIES[:2])
    journal.add(ENTRIES[2:])
    assert _entries(path) == ENTRIES


def test_entries_are_there_when_the_writer_is_killed_right_after(path: Path) -> None:
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from fedsft_assets.federation.protocol.journal import Journal, RoundDone\n"
        "from fedsft_assets.federation.protocol.points import Point\n"
        "Journal(Path(sys.argv[1])).add([Point('val_loss', 2.5, 1, 16), RoundDone(1)])\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert killed.returncode == -9
    assert _entries(path) == [Point("val_loss", 2.5, 1, 16), RoundDone(1)]


def test_entries_are_on_the_disk_when_the_call_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, sizes = Journal(path), []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), real(handle)))
    journal.add([Progress("busy")], durable=False)
    assert sizes == []
    journal.add(ENTRIES)
    assert sizes == [path.stat().st_size]


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_on_a_full_disk_nobody_reads_a_line_that_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        journal, reader = Journal(disk / "journal.jsonl"), Tail(disk / "journal.jsonl")
        journal.add([RoundDone(1)])
        fill(disk / "ballast")
        seen: list[str] = []
        truncate = os.truncate

        def look_and_truncate(path: Path, size: int) -> None:
            seen.extend(reader.new_lines())
            truncate(path, size)

        monkeypatch.setattr(os, "truncate", look_and_truncate)
        with pytest.raises(OSError, match="No space left on device"):
            journal.add([Progress("a line that fits"), Progress("a line that does not " * 10_000)])
        assert seen == [to_line(RoundDone(1))[:-1]]
        (disk / "ballast").unlink()
        journal.add([RoundDone(2)])
        assert reader.new_lines() == [to_line(RoundDone(2))[:-1]]


def test_points_that_came_early_are_on_the_disk_once_they_come_with_a_result(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, sizes = Journal(path), []
    journal.add([POINT], durable=False)
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), real(handle)))
    journal.add([POINT])
    assert sizes == [path.stat().st_size] == [len(to_line(POINT))]


def test_point_that_is_there_already_is_left_out(path: Path) -> None:
    journal = Journal(path)
    later = replace(POINT, value=5.0, samples=1, tokens=2, time=3.0)
    journal.add([POINT, later])
    journal.add([later])
    assert _entries(path) == [POINT]
    journal.add([replace(POINT, step=8), replace(POINT, round=4), replace(POINT, site=None)])
    assert len(_entries(path)) == 4


def test_point_of_an_earlier_process_is_left_out_too(path: Path) -> None:
    Journal(path).add([POINT])
    Journal(path).add([replace(POINT, value=5.0), replace(POINT, step=8)])
    assert _entries(path) == [POINT, replace(POINT, step=8)]


def test_what_is_no_point_is_never_left_out(path: Path) -> None:
    for _ in range(2):
        Journal(path).add([Progress("again"), RoundDone(1)])
    assert _entries(path) == [Progress("again"), RoundDone(1)] * 2


@pytest.mark.parametrize("left", [1, 20, pytest.param(len(to_line(POINT)) - 1, id="all but its end")])
def test_torn_last_line_is_removed_and_its_point_is_taken_again(path: Path, left: int) -> None:
    Journal(path).add([RoundDone(2)])
    with path.open("a") as file:
        file.write(to_line(POINT)[:left])
    journal = Journal(path)
    assert _entries(path) == [RoundDone(2)]
    journal.add([POINT])
    assert _entries(path) == [RoundDone(2), POINT]


def test_file_with_nothing_but_a_torn_line_is_empty(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes('{"entry": "progress", "text": "·'.encode()[:-1])
    assert Journal(path).read(0) == ("", 0)
    assert path.read_bytes() == b""


def test_read_hands_out_each_whole_line_once(path: Path) -> None:
    journal = Journal(path)
    assert journal.read(0) == ("", 0)
    journal.add([RoundDone(1), RoundDone(2)])
    text, offset = journal.read(0)
    assert [from_line(line) for line in text.splitlines()] == [RoundDone(1), RoundDone(2)]
    assert journal.read(offset) == ("", offset)
    journal.add([RoundDone(3)])
    assert journal.read(offset) == (to_line(RoundDone(3)), path.stat().st_size)


def test_read_leaves_an_unfinished_line_for_later(path: Path) -> None:
    journal = Journal(path)
    journal.add([RoundDone(1)])
    _, offset = journal.read(0)
    line = '{"entry": "progress", "text": "site-1 · é"}\n'.encode()
    cut = line.index("·".encode()) + 1
    with path.open("ab") as file:
        file.write(line[:cut])
    assert journal.read(offset) == ("", offset)
    with path.open("ab") as file:
        file.write(line[cut:])
    text, end = journal.read(offset)
    assert from_line(text) == Progress("site-1 · é")
    assert end == path.stat().st_size


def test_read_leaves_room_that_is_not_filled_yet_for_later(path: Path) -> None:
    journal = Journal(path)
    journal.add([Progress("one")])
    one = path.read_bytes()
    path.write_bytes(one + bytes(len(one)) + one)
    assert journal.read(0) == (one.decode(), len(one))
    path.write_bytes(one * 3)
    assert journal.read(len(one)) == (one.decode() * 2, 3 * len(one))


def test_large_journal_is_handed_out_in_parts(path: Path) -> None:
    journal = Journal(path)
    said = [Progress(f"{k} {'x' * 1000}") for k in range(2500)]
    journal.add(said, durable=False)
    parts, offset = [], 0
    while True:
        text, offset = journal.read(offset)
        if not text:
            break
        parts.append(text)
    assert len(parts) == 3
    assert all(len(part) <= BIG and part.endswith("\n") for part in parts)
    assert [from_line(line) for part in parts for line in part.splitlines()] == said
    assert offset == path.stat().st_size


def test_line_that_is_larger_than_a_part_is_handed_out_whole(path: Path) -> None:
    journal = Journal(path)
    entries: list[Entry] = [Missed("site-1", 1, "its trainer failed", "x" * (2 * BIG)), RoundDone(1)]
    journal.add(entries)
    text, offset = journal.read(0)
    rest, end = journal.read(offset)
    assert [from_line(line) for line in (text + rest).splitlines()] == entries
    assert end == path.stat().st_size


def test_journal_is_json_lines_that_say_what_they_are(path: Path) -> None:
    Journal(path).add(ENTRIES)
    kinds = [json.loads(line)["entry"] for line in path.read_text().splitlines()]
    assert kinds == [*["point"] * 3, "progress", *["missed"] * 2, "round", "started", "stopped", "finished"]
