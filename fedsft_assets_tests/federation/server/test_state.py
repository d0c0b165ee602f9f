"""What a server keeps from round to round, also if it is killed while it does so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fedsft_assets.federation.server.state import RoundsDone, ServerState, remove_archived
from fedsft_assets.settings import PROJECT
from fedsft_assets_tests.small_disk import fill, small_disk, why_not


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "states" / "execution"


def _weights(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((3,), value), "scale": torch.tensor(-value, dtype=torch.float32)}


def _commit(state: ServerState, weights: dict[str, torch.Tensor], algorithm: dict[str, torch.Tensor]) -> None:
    state.write_weights(state.progress.finished, weights, weights.__getitem__)
    state.commit_round(algorithm)


def play(state: ServerState, rounds: int, best: int = 1) -> None:
    for number in range(state.progress.finished + 1, rounds + 1):
        state.progress.finished = number
        if number == best + 1:
            state.progress.best_round, state.progress.best_loss = best, 2.5
        _commit(state, _weights(number), {"momentum": torch.tensor([float(number)])})


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_state_has_no_finished_round(folder: Path) -> None:
    state = ServerState(folder)
    assert state.progress == RoundsDone(finished=0, samples={}, best_round=0, best_loss=None, first=None)
    assert state.algorithm() == {}


def test_state_is_the_same_after_it_is_opened_again(folder: Path) -> None:
    state = ServerState(folder)
    state.progress = RoundsDone(3, {"site-1": 48, "site-é": 7}, 2, 1.25, "digest")
    _commit(state, _weights(0.1), {"momentum": torch.tensor([0.3])})
    again = ServerState(folder)
    assert again.progress == state.progress
    assert again.weights().keys() == {"w", "scale"}
    assert all(torch.equal(tensor, _weights(0.1)[name]) for name, tensor in again.weights().items())
    assert torch.equal(again.algorithm()["momentum"], torch.tensor([0.3]))


def test_best_loss_that_is_no_number_can_be_kept(folder: Path) -> None:
    state = ServerState(folder)
    state.progress = RoundsDone(1, {}, 1, float("inf"))
    _commit(state, _weights(1), {})
    assert ServerState(folder).progress.best_loss == float("inf")


def test_only_the_files_of_the_last_and_the_best_round_are_kept(folder: Path) -> None:
    state = ServerState(folder)
    play(state, 5, best=2)
    assert _files(folder) == ["algorithm-000005.pt", "model-000002.pt", "model-000005.pt", "state.json"]
    assert torch.equal(torch.load(state.model_file(2))["w"], _weights(2)["w"])
    assert torch.equal(state.weights()["w"], _weights(5)["w"])


def test_model_that_has_just_become_the_best_outlives_the_next_round(folder: Path) -> None:
    state = ServerState(folder)
    play(state, 3)
    state.progress.best_round, state.progress.best_loss = 3, 1.0  # its loss is known in the round after it
    state.progress.finished = 4
    _commit(state, _weights(4), {})
    assert _files(folder) == ["model-000003.pt", "model-000004.pt", "state.json"]


def test_progress_alone_is_committed_with_the_weights_that_are_there(folder: Path) -> None:
    state = ServerState(folder)
    play(state, 3)
    state.progress.best_round, state.progress.best_loss = 3, 0.5
    state.commit_progress()
    again = ServerState(folder)
    assert again.progress.best_round == 3
    assert torch.equal(again.weights()["w"], _weights(3)["w"])
    assert _files(folder) == ["algorithm-000003.pt", "model-000003.pt", "state.json"]


def test_algorithm_that_keeps_nothing_has_no_file(folder: Path) -> None:
    state = ServerState(folder)
    state.progress.finished = 1
    _commit(state, _weights(1), {})
    assert ServerState(folder).algorithm() == {}
    assert _files(folder) == ["model-000001.pt", "state.json"]


def test_progress_that_is_not_committed_is_lost(folder: Path) -> None:
    state = ServerState(folder)
    play(state, 2)
    state.progress.finished = 3
    assert ServerState(folder).progress.finished == 2


@pytest.mark.parametrize("content", ["", "{", "3", '{"finished": 1, "colour": "red"}'])
def test_state_that_cannot_be_read_is_an_error_that_says_what_to_do(folder: Path, content: str) -> None:
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(content)
    with pytest.raises(ValueError, match=rf"^{folder}/state.json: not a valid job state: .*; remove {folder} to"):
        ServerState(folder)


def test_files_of_others_in_the_folder_are_left_alone(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "journal.jsonl").write_text("{}\n")
    play(ServerState(folder), 3)
    assert (folder / "journal.jsonl").read_text() == "{}\n"


# Commits round 3 in a child process for each call that touches the disk, which dies right before that call.
_KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from fedsft_assets_tests.federation.server.test_state import play
from fedsft_assets.federation.server.state import ServerState

torch.set_num_threads(1)

def dies_at(deadly):
    calls = []
    def counted(real):
        def call(*args, **named):
            if len(calls) == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(real)
            return real(*args, **named)
        return call
    os.fsync, os.replace, Path.unlink = counted(os.fsync), counted(os.replace), counted(Path.unlink)

root = Path(sys.argv[1])
play(ServerState(root / "before"), 2)
for deadly in range(100):
    folder = root / f"{deadly:02d}"
    shutil.copytree(root / "before", folder)
    child = os.fork()
    if child == 0:
        state = ServerState(folder)
        dies_at(deadly)
        play(state, 3)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    print(deadly)
"""


def test_server_that_is_killed_during_a_commit_leaves_the_older_state_or_the_newer_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path)], capture_output=True, text=True, check=True, cwd=PROJECT
    )
    deadly = [int(line) for line in done.stdout.split()]
    finished = []
    for number in [*deadly, len(deadly)]:
        folder = tmp_path / f"{number:02d}"
        state = ServerState(folder)
        after = state.progress.finished
        finished.append(after)
        left = [name for name in _files(folder) if name != "state.json.new"]
        assert left == [f"algorithm-00000{after}.pt", "model-000001.pt", f"model-00000{after}.pt", "state.json"]
        assert torch.equal(state.weights()["w"], _weights(after)["w"])
        assert torch.equal(state.algorithm()["momentum"], torch.tensor([float(after)]))
        play(state, 4)  # and it goes on from there
        assert torch.equal(ServerState(folder).weights()["w"], _weights(4)["w"])
    assert len(deadly) >= 8  # two files and the progress are written through and renamed, two old files removed
    assert finished == sorted(finished)
    assert set(finished) == {2, 3}


@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_full_disk_is_named_and_leaves_the_last_round_and_room_to_say_so(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=4) as disk:
        state = ServerState(disk / "execution")
        play(state, 2)
        before = _files(state.folder)
        fill(disk / "ballast")
        os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 200_000)
        state.progress.finished = 3
        with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/model-000003\.pt'$"):
            _commit(state, {"w": torch.zeros(100_000)}, {})
        assert _files(state.folder) == before
        (disk / "said").write_bytes(bytes(100_000))
        assert ServerState(state.folder).progress.finished == 2


def test_what_state_json_names_is_written_through_before_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        order.append("fsync")
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        order.append(Path(target).name)
        real_replace(source, target)

    state = ServerState(folder)
    state.progress.finished = 1
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    _commit(state, _weights(1), {"momentum": torch.zeros(1)})
    assert order[:6] == ["fsync", "model-000001.pt", "fsync", "algorithm-000001.pt", "fsync", "state.json"]
    assert json.loads((folder / "state.json").read_text())["finished"] == 1


def test_state_of_a_finished_job_goes_when_its_result_is_archived_and_not_before(tmp_path: Path) -> None:
    states, run_dirs = tmp_path / "states", tmp_path / "jobs"
    for name in ("archived", "not-archived", "just-archived", "under-way", "own"):
        state = ServerState(states / name)
        if name != "under-way":
            state.hand_over_to(run_dirs / name)
            os.utime(state.folder / "handed_over.json", times=(0, 0))
    (states / "just-archived" / "handed_over.json").touch()
    (run_dirs / "not-archived").mkdir(parents=True)
    remove_archived(states, but=states / "own")
    assert {path.name for path in states.iterdir()} == {"not-archived", "just-archived", "under-way", "own"}
