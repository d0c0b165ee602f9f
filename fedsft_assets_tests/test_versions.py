"""Versions: a content lies under its digest, never changes, and becomes current only by being made so."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedsft_assets.files import folder_digest, publish_folder
from fedsft_assets.versions import (
    CURRENT,
    NoVersionError,
    Verdict,
    accepted,
    add_version,
    adding,
    current,
    existing,
    judge,
    make_current,
    read_verdict,
    short,
    title,
    versions_of,
)


@pytest.fixture
def versions(tmp_path: Path) -> Path:
    return tmp_path / "home" / "processed" / "dolly"


def _add(versions: Path, content: str) -> Path:
    with adding(versions) as addition:
        (addition.folder / "a").write_text(content)
    return addition.version


def test_a_version_lies_under_its_digest_and_another_beside_it(versions: Path) -> None:
    first, second = _add(versions, "1"), _add(versions, "2")
    assert first.name == folder_digest(first) != second.name == folder_digest(second)
    assert ((first / "a").read_text(), (second / "a").read_text()) == ("1", "2")
    assert set(versions_of(versions)) == {first, second}
    assert sorted(path.name for path in versions.iterdir()) == sorted([first.name, second.name])


def test_the_same_content_is_the_same_version_and_stays_as_it_is(versions: Path) -> None:
    first = _add(versions, "1")
    before = (first / "a").stat()
    assert _add(versions, "1") == first
    assert (first / "a").stat() == before


def test_what_is_written_may_be_published_into_the_new_folder(versions: Path) -> None:
    with adding(versions) as addition, publish_folder(addition.folder) as fresh:
        (fresh / "a").write_text("1")
    assert addition.version == _add(versions, "1")


def test_a_block_that_fails_leaves_nothing(versions: Path) -> None:
    def fail() -> None:
        with adding(versions) as addition:
            (addition.folder / "a").write_text("2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not versions.exists()
    version = _add(versions, "1")
    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(versions.iterdir()) == [version]


_ADD_FOREVER = """
import sys, time
from pathlib import Path
from fedsft_assets.versions import adding
with adding(Path(sys.argv[1])) as addition:
    (addition.folder / "a").write_text("half of")
    print("writing", flush=True)
    time.sleep(600)
"""


def test_what_a_killed_process_left_is_no_version_and_goes_with_the_next(versions: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _ADD_FOREVER, str(versions)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"writing\n"
        assert versions_of(versions) == []
        os.kill(writer.pid, signal.SIGKILL)
    version = _add(versions, "1")
    assert list(versions.iterdir()) == [version]


def test_nothing_is_current_until_it_is_made_so(versions: Path) -> None:
    first, second = _add(versions, "1"), _add(versions, "2")
    with pytest.raises(NoVersionError, match=f"^{versions}: has no current version; materialize its asset first$"):
        current(versions)
    make_current(first)
    assert current(versions) == first
    make_current(second)
    assert current(versions) == second


def test_a_current_version_is_found_where_the_home_was_moved_to(versions: Path, tmp_path: Path) -> None:
    version = _add(versions, "1")
    make_current(version)
    (tmp_path / "home").rename(tmp_path / "elsewhere")
    moved = tmp_path / "elsewhere" / "processed" / "dolly"
    assert current(moved) == moved / version.name


def test_a_link_that_was_copied_as_a_folder_is_named(versions: Path) -> None:
    make_current(_add(versions, "1"))
    (versions / CURRENT).unlink()
    (versions / CURRENT).mkdir()
    with pytest.raises(NoVersionError, match=f"^{versions / CURRENT}: not a link to a version"):
        current(versions)


def test_a_version_that_is_gone_is_named(versions: Path) -> None:
    gone = versions / ("0" * 64)
    with pytest.raises(NoVersionError, match=f"^{gone}: does not exist"):
        existing(gone)
    with pytest.raises(NoVersionError, match=f"^{gone}: does not exist"):
        make_current(gone)


def test_files_of_a_folder_become_a_version_without_a_copy(versions: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_text("1")
    version = add_version(versions, tmp_path / "a")
    assert (version / "file").samefile(tmp_path / "a" / "file")


def test_only_a_version_that_no_check_refuses_becomes_current_and_may_be_trained_on(versions: Path) -> None:
    good, bad = _add(versions, "1"), _add(versions, "2")
    with pytest.raises(NoVersionError, match="its checks have not run"):
        accepted(good)
    judge(good, Verdict())
    judge(bad, Verdict({"row_count": "60 records", "duplicates": "many"}, ["duplicates"], "me"))
    assert current(versions) == good == accepted(good)
    with pytest.raises(NoVersionError) as refused:
        accepted(bad)
    assert str(refused.value) == (
        f"{bad}: failed its checks (row_count: 60 records); fix the data, or accept it: fedsft accept dolly row_count"
    )
    judge(good, Verdict({"row_count": "9 records"}))
    with pytest.raises(NoVersionError, match="failed its checks"):
        accepted(current(versions))


def test_verdict_is_read_as_it_was_given(versions: Path) -> None:
    version = _add(versions, "1")
    assert read_verdict(version) is None
    verdict = Verdict({"row_count": "60 records"}, ["row_count"], "me")
    judge(version, verdict)
    assert read_verdict(version) == verdict
    assert current(versions) == version


def test_a_person_reads_current_where_that_is_the_version(versions: Path) -> None:
    first, second = _add(versions, "1"), _add(versions, "2")
    make_current(second)
    assert (short(first), short(second)) == (first, versions / CURRENT)
    assert (title(first), title(versions)) == ("dolly", "dolly")


def test_refused_data_is_accepted_from_the_command_line(versions: Path, tmp_path: Path) -> None:
    good, bad = _add(versions, "1"), _add(versions, "2")
    judge(good, Verdict())
    judge(bad, Verdict({"row_count": "60 records"}))

    def accept(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedsft_assets.cli", "accept", *arguments]
        environment = {"PATH": "/usr/bin:/bin", "FEDSFT_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    refused = accept("dolly", "languages")
    assert refused.returncode == 1
    assert refused.stderr == f"{bad}: failed row_count, not languages; name all failed checks\n"
    assert current(versions) == good
    done = accept("dolly", "row_count")
    assert done.stdout == f"{bad}: is now current; accepted despite row_count\n"
    assert current(versions) == bad
    verdict = read_verdict(bad)
    assert verdict is not None
    assert (verdict.accepted, verdict.by.endswith(", by fedsft accept")) == (["row_count"], True)
