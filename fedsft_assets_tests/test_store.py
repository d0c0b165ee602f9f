"""The store: what is published is whole, whatever happens to the writer, and digests name content."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedsft_assets.files import HashedFile, file_digest, folder_digest, publish_file, publish_folder
from fedsft_assets.store import Store, split_file

_STOP_INSIDE_FOLDER = """
import sys, time
from pathlib import Path
from fedsft_assets.files import publish_folder
with publish_folder(Path(sys.argv[1])) as fresh:
    (fresh / "a").write_text("new")
    print("writing", flush=True)
    time.sleep(600)
"""
_STOP_INSIDE_FILE = """
import sys, time
from pathlib import Path
from fedsft_assets.files import publish_file
with publish_file(Path(sys.argv[1])) as fresh:
    fresh.write_text("new, and only half of")
    print("writing", flush=True)
    time.sleep(600)
"""
_PUBLISH_FILE_FOREVER = """
import itertools, sys
from pathlib import Path
from fedsft_assets.files import publish_file
for k in itertools.count():
    with publish_file(Path(sys.argv[1])) as fresh, fresh.open("w") as file:
        for _ in range(50):
            print(sys.argv[0], k, file=file, flush=True)
    if k == 3:
        print("writing", flush=True)
"""
_PUBLISH_FOREVER = """
import itertools, sys
from pathlib import Path
from fedsft_assets.files import publish_folder
for k in itertools.count():
    with publish_folder(Path(sys.argv[1])) as fresh:
        for name in "abc":
            (fresh / name).write_text(str(k))
    if k == 3:
        print("writing", flush=True)
"""


def _kill_while_it_writes(script: str, target: Path, after: float = 0.0) -> None:
    command = [sys.executable, "-c", script, str(target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        try:
            writer.wait(timeout=after)
        except subprocess.TimeoutExpired:
            pass
        os.kill(writer.pid, signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL


def _contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def _read_together(folder: Path) -> list[bytes]:
    """The files a, b and c of what is at this path now, even if another folder takes its place meanwhile."""
    place = os.open(folder, os.O_RDONLY)
    try:
        handles = [os.open(name, os.O_RDONLY, dir_fd=place) for name in "abc"]
        contents = [os.read(handle, 100) for handle in handles]
        for handle in handles:
            os.close(handle)
        return contents
    finally:
        os.close(place)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A published folder with two files."""
    target = tmp_path / "store" / "target"
    with publish_folder(target) as fresh:
        (fresh / "a").write_text("old a")
        (fresh / "b").write_text("old b")
    return target


def test_published_folder_replaces_the_old_one_whole(target: Path) -> None:
    with publish_folder(target) as fresh:
        (fresh / "deep").mkdir()
        (fresh / "deep" / "c").write_text("new c")
        assert _contents(target) == {"a": "old a", "b": "old b"}
    assert _contents(target) == {"deep/c": "new c"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_failure_in_the_block_leaves_the_old_folder(target: Path) -> None:
    def fail() -> None:
        with publish_folder(target) as fresh:
            (fresh / "a").write_text("new a")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert _contents(target) == {"a": "old a", "b": "old b"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_killed_writer_leaves_the_old_folder_whole(target: Path) -> None:
    _kill_while_it_writes(_STOP_INSIDE_FOLDER, target)
    assert _contents(target) == {"a": "old a", "b": "old b"}
    with publish_folder(target) as fresh:
        assert _contents(fresh) == {}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


@pytest.mark.parametrize("after", [0.0, 0.003, 0.007, 0.013, 0.029])
def test_writer_killed_at_any_moment_never_leaves_a_mixture(target: Path, after: float) -> None:
    _kill_while_it_writes(_PUBLISH_FOREVER, target, after)
    old = target.with_name(f".{target.name}.old")
    content = _contents(target if target.exists() else old)
    assert sorted(content) == ["a", "b", "c"]
    assert len(set(content.values())) == 1


def test_writers_at_the_same_time_do_not_get_into_each_others_folder(target: Path) -> None:
    with publish_folder(target) as one:
        (one / "a").write_text("one")
        with publish_folder(target) as two:
            (two / "a").write_text("two")
            (two / "b").write_text("two")
        assert _contents(target) == {"a": "two", "b": "two"}
        (one / "b").write_text("one")
    assert _contents(target) == {"a": "one", "b": "one"}
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_many_writers_at_the_same_time_never_publish_a_mixture(target: Path) -> None:
    command = [sys.executable, "-c", _PUBLISH_FOREVER, str(target)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
        whole = 0
        while whole < 50:
            with contextlib.suppress(FileNotFoundError):  # it was replaced while it was read
                assert len(set(_read_together(target))) == 1
                whole += 1
        assert [writer.poll() for writer in writers] == [None] * 3
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    with publish_folder(target):
        pass
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_folder_moved_aside_by_a_writer_that_died_is_put_back(target: Path) -> None:
    target.rename(target.with_name(".target.old"))

    def fail() -> None:
        with publish_folder(target):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert _contents(target) == {"a": "old a", "b": "old b"}


def test_folder_moved_aside_is_dropped_when_a_newer_one_is_in_place(target: Path) -> None:
    old = target.with_name(".target.old")
    old.mkdir()
    (old / "a").write_text("older still")
    with publish_folder(target) as fresh:
        (fresh / "a").write_text("new a")
    assert _contents(target) == {"a": "new a"}
    assert not old.exists()


def test_published_file_replaces_the_old_one_at_once(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file"
    for content in ("old", "new"):
        with publish_file(target) as fresh:
            fresh.write_text(content)
        assert target.read_text() == content
    assert [path.name for path in target.parent.iterdir()] == ["file"]


def test_failure_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")

    def fail() -> None:
        with publish_file(target) as fresh:
            fresh.write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert _contents(tmp_path) == {"file": "old"}


def test_block_that_writes_nothing_publishes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(FileNotFoundError), publish_file(target):
        pass
    assert _contents(tmp_path) == {"file": "old"}


def test_killed_writer_leaves_the_old_file_and_the_next_one_removes_what_it_left(tmp_path: Path) -> None:
    target = tmp_path / "fi[l]e"
    target.write_text("old")
    _kill_while_it_writes(_STOP_INSIDE_FILE, target)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
    with publish_file(target) as fresh:
        fresh.write_text("new")
    assert _contents(tmp_path) == {"fi[l]e": "new"}
    assert len(list(tmp_path.iterdir())) == 1


def test_writer_that_lives_keeps_its_file_while_others_publish(tmp_path: Path) -> None:
    target = tmp_path / "file"
    command = [sys.executable, "-c", _STOP_INSIDE_FILE, str(target)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        with publish_file(target) as fresh:
            fresh.write_text("ours")
        (theirs,) = (path for path in tmp_path.rglob("*") if path.is_file() and path != target)
        assert theirs.read_text() == "new, and only half of"
        assert target.read_text() == "ours"
    finally:
        writer.kill()
        writer.communicate()


def test_writers_of_a_file_at_the_same_time_do_not_get_into_each_others(tmp_path: Path) -> None:
    target = tmp_path / "file"
    with publish_file(target) as one:
        one.write_text("one")
        with publish_file(target) as two:
            two.write_text("two")
        assert target.read_text() == "two"
        assert one.read_text() == "one"
    assert target.read_text() == "one"
    assert _contents(tmp_path) == {"file": "one"}


def test_file_that_is_moved_to_where_it_is_published_from_is_not_taken_for_left_behind(tmp_path: Path) -> None:
    target, made = tmp_path / "file", tmp_path / "made elsewhere"
    made.write_text("made elsewhere")
    with publish_file(target) as fresh:
        fresh.write_text("a beginning")
        made.rename(fresh)
        with publish_file(target) as other:
            other.write_text("other")
    assert _contents(tmp_path) == {"file": "made elsewhere"}


def test_file_is_published_without_waiting_for_the_folders_around_it(target: Path) -> None:
    parent = os.open(target.parent, os.O_RDONLY)
    with publish_folder(target) as fresh:
        fcntl.flock(parent, fcntl.LOCK_EX)
        for path in (fresh / "a", target.parent / "beside"):
            with publish_file(path) as file:
                file.write_text("new")
        os.close(parent)
    assert _contents(target.parent) == {"target/a": "new", "beside": "new"}


def test_writer_whose_place_is_taken_for_left_behind_before_it_is_locked_takes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"

    def another_publishes_first(handle: int, how: int) -> None:
        monkeypatch.undo()
        with publish_file(target) as other:
            other.write_text("other")
        assert [path.name for path in tmp_path.iterdir()] == ["file"]
        fcntl.flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", another_publishes_first)
    with publish_file(target) as fresh:
        fresh.write_text("new")
    assert _contents(tmp_path) == {"file": "new"}


@pytest.mark.parametrize("after", [0.0, 0.003, 0.007, 0.013, 0.029])
def test_writer_of_a_file_killed_at_any_moment_leaves_it_whole(tmp_path: Path, after: float) -> None:
    target = tmp_path / "file"
    _kill_while_it_writes(_PUBLISH_FILE_FOREVER, target, after)
    assert len(set(target.read_text().splitlines())) == 1
    assert target.read_text().count("\n") == 50


def test_many_writers_of_a_file_at_the_same_time_never_publish_a_mixture(tmp_path: Path) -> None:
    target = tmp_path / "file"
    command = [sys.executable, "-c", _PUBLISH_FILE_FOREVER, str(target)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "writing\n"
        seen = set()
        while len(seen) < 100:
            content = target.read_text()
            assert len(set(content.splitlines())) == 1
            assert content.count("\n") == 50
            seen.add(content)
            assert [writer.poll() for writer in writers] == [None] * 3
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    with publish_file(target) as fresh:
        fresh.write_text("the last")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _folder(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_digest_depends_on_names_and_contents_only(tmp_path: Path) -> None:
    files = {"b": "2", "a": "1", "deep/c": "3"}
    one = _folder(tmp_path / "one", files)
    two = _folder(tmp_path / "elsewhere" / "two", dict(reversed(files.items())))
    os.utime(two / "a", (0, 0))
    (two / "b").chmod(0o600)
    assert folder_digest(one) == folder_digest(two)
    assert file_digest(one / "a") == file_digest(two / "a")


@pytest.mark.parametrize(
    "files",
    [
        {"a": "1", "b": "2", "deep/c": "4"},
        {"a": "2", "b": "1", "deep/c": "3"},
        {"a": "1", "b": "2", "c": "3"},
        {"a": "1", "b": "2", "deep/c": "3", "empty": ""},
        {"a": "1", "deep/c": "3"},
    ],
    ids=["other content", "contents swapped", "other name", "one more", "one less"],
)
def test_digest_tells_different_folders_apart(tmp_path: Path, files: dict[str, str]) -> None:
    one = _folder(tmp_path / "one", {"a": "1", "b": "2", "deep/c": "3"})
    assert folder_digest(one) != folder_digest(_folder(tmp_path / "two", files))


def test_file_digest_is_the_sha256_of_a_file_larger_than_one_read(tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"fedsft" * 400_000)
    printed = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
    assert file_digest(path) == printed.split()[0]


def test_everything_lives_under_one_home(tmp_path: Path) -> None:
    store = Store(tmp_path)
    places = [
        store.raw("dolly"),
        store.processed("dolly"),
        store.combined,
        store.base_model("tiny"),
        store.job_folder("fedavg"),
        store.checkpoint("fedavg"),
        store.flare("fedavg"),
        store.mlflow_artifacts,
        store.made,
        store.report("comparison"),
        store.outbox,
        store.tensorboard("fedavg"),
        Path(store.mlflow_uri.removeprefix("sqlite:///")),
    ]
    assert all(place.is_relative_to(tmp_path) for place in places)
    assert len(set(places)) == len(places)


def test_combined_is_a_dataset_where_splits_are_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert split_file(store.splits("combined"), "testing") == tmp_path / "combined" / "testing.jsonl"
    assert split_file(store.splits("dolly"), "training") == tmp_path / "processed" / "dolly" / "training.jsonl"


def test_a_hashed_file_holds_its_blocks_in_order_and_knows_their_digest(tmp_path: Path) -> None:
    path = tmp_path / "blocks"
    with HashedFile(path) as file:
        for n in range(200):
            file.write(f"{n}\n".encode() * n)
    assert path.read_bytes() == b"".join(f"{n}\n".encode() * n for n in range(200))
    assert file.digest == file_digest(path)


def test_what_goes_wrong_in_a_hashed_file_reaches_the_caller(tmp_path: Path) -> None:
    def write_all() -> None:
        with HashedFile(tmp_path / "blocks") as file:
            file.write("one")  # type: ignore[arg-type]
            file.write(b"two")

    with pytest.raises(TypeError, match="bytes-like"):
        write_all()
    with pytest.raises(KeyError), HashedFile(tmp_path / "blocks") as file:
        raise KeyError
    assert file.digest == "", "what was not finished has no digest"
