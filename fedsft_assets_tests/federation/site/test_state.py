"""What a site's trainer finds of the one before it."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from fedsft_assets.federation.protocol.messages import EXECUTION_KEY, SITE_STATE_ROOT
from fedsft_assets.federation.protocol.state_folder import site_state_folder
from fedsft_assets.federation.site.state import SiteState
from fedsft_assets_tests.small_disk import fill, small_disk, why_not

CPU = torch.device("cpu")


def _moments(value: float) -> dict[str, object]:
    return {"moments": {0: {"step": torch.tensor(value), "exp_avg": torch.full((3,), value)}}, "control": {}}


def test_what_was_kept_after_a_round_comes_back_bit_for_bit(tmp_path: Path) -> None:
    SiteState(tmp_path).save(3, _moments(0.1))
    kept = SiteState(tmp_path).load(3, CPU)
    assert kept is not None
    assert torch.equal(kept["moments"][0]["exp_avg"], torch.full((3,), 0.1))
    assert SiteState(tmp_path).load(2, CPU) is None


def test_round_that_is_done_again_finds_what_there_was_before_it(tmp_path: Path) -> None:
    state = SiteState(tmp_path)
    for finished in (1, 2, 3):
        state.save(finished, _moments(float(finished)))
    again = state.load(2, CPU)
    assert again is not None
    assert again["moments"][0]["step"].item() == 2.0
    assert state.load(1, CPU) is None


def test_processes_of_one_site_keep_their_own(tmp_path: Path) -> None:
    SiteState(tmp_path, rank=0).save(1, _moments(0.0))
    SiteState(tmp_path, rank=1).save(1, _moments(1.0))
    kept = SiteState(tmp_path, rank=1).load(1, CPU)
    assert kept is not None
    assert kept["moments"][0]["step"].item() == 1.0


def test_nothing_is_kept_once_no_round_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "states" / "abc" / "site-1"
    states = [SiteState(folder, rank) for rank in (0, 1)]
    for state in states:
        state.save(1, _moments(0.0))
    states[0].clear()
    assert states[1].load(1, CPU) is not None
    states[1].clear()
    assert list((tmp_path / "states").iterdir()) == []
    states[0].clear()  # nor is it missed


def test_what_the_server_cannot_go_on_with_is_removed_and_what_may_just_have_begun_is_not(tmp_path: Path) -> None:
    def kept(execution: str, site: str, minutes: int) -> Path:
        folder = tmp_path / execution / site
        SiteState(folder).save(1, _moments(0.0))
        os.utime(folder, times=(0, time.time() - 60 * minutes))
        return folder

    known, own = kept("known", "site-1", 99), kept("abc", "site-1", 99)
    gone, fresh, of_another = kept("gone", "site-1", 11), kept("fresh", "site-1", 9), kept("gone", "site-2", 99)
    SiteState(own).clear_others(["known"])
    assert [path.exists() for path in (known, own, gone, fresh, of_another)] == [True, True, False, True, True]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Where NVFlare runs a job at a site."""
    folder = tmp_path / "site-1" / "job"
    folder.mkdir(parents=True)
    (folder / "meta.json").write_text(json.dumps({EXECUTION_KEY: "abc"}))
    return folder


def test_jobs_of_one_execution_share_a_folder(run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(SITE_STATE_ROOT, raising=False)
    assert site_state_folder(run_dir, "site-1") == tmp_path / "site-1" / "fedsft" / "abc" / "site-1"
    monkeypatch.setenv(SITE_STATE_ROOT, str(tmp_path / "states"))
    assert site_state_folder(run_dir, "site-1") == tmp_path / "states" / "abc" / "site-1"


def test_states_of_which_nothing_was_heard_for_a_month_are_removed(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(SITE_STATE_ROOT, str(tmp_path / "states"))
    for name, days in (("old", 31), ("recent", 29), ("abc", 99)):
        (tmp_path / "states" / name).mkdir(parents=True)
        os.utime(tmp_path / "states" / name, times=(0, time.time() - days * 86_400))
    site_state_folder(run_dir, "site-1")
    assert {path.name for path in (tmp_path / "states").iterdir()} == {"recent", "abc"}


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_full_disk_is_named_and_leaves_what_was_kept_and_room_to_say_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        state = SiteState(disk / "site-1")
        state.save(1, _moments(1.0))
        for room in (0, 200_000):
            fill(disk / "ballast")
            os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - room)
            with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/0-000002\.pt'$"):
                state.save(2, {"moments": torch.zeros(100_000)})
            (disk / "said").write_bytes(bytes(room // 2))
            assert state.load(1, CPU) is not None
            assert {path.name for path in (disk / "site-1").iterdir()} == {"0-000001.pt"}
