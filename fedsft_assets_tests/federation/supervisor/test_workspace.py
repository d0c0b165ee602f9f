"""What the operator's side keeps of an execution, and when it begins another one."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fedsft_assets.federation.supervisor.workspace import Execution, ExecutionRecord, Workspace, Workspaces

SUBJECT = {"runtime": "simulator", "job_folder": "a", "base_model": "b"}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "flare" / "fedavg")


def test_new_workspace_has_no_execution(workspace: Workspace) -> None:
    assert workspace.execution() is None
    workspace.end()
    assert workspace.execution() is None


def test_execution_is_taken_up_again_with_all_that_is_known_of_it(workspace: Workspace) -> None:
    begun = workspace.resume_or_create(SUBJECT)
    assert (begun.submissions, begun.job_id, begun.rounds, begun.seconds) == (0, None, 0, 0.0)
    assert (begun.status, begun.ended) == (None, False)
    known = workspace.save(replace(begun, submissions=2, job_id="7", rounds=3, seconds=4.5, status="finished"))
    workspace.journal.write_text("")
    assert Workspace(workspace.folder).resume_or_create(dict(SUBJECT)) == known
    assert workspace.journal.exists()


def test_run_time_until_a_moment_leaves_out_pauses_between_attempts(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    workspace.resume_or_create(SUBJECT)
    first = ExecutionRecord(workspace)
    assert first.seconds_at(1000.0) == 0.0
    workspace.save(replace(first.now, seconds=50.0, attempts=[[1000.0, 0.0]]))
    monkeypatch.setattr(time, "time", lambda: 5000.0)
    second = ExecutionRecord(workspace)
    monkeypatch.setattr(time, "monotonic", lambda: second._begun + 30.0)
    second.save()
    assert workspace.execution() == second.now
    assert second.now.attempts == [[1000.0, 0.0], [5000.0, 50.0]]
    moments = [900.0, 1000.0, 1020.0, 1050.0, 4000.0, 5000.0, 5010.0, 5030.0, 9999.0]
    assert [second.seconds_at(moment) for moment in moments] == [0, 0, 20, 50, 50, 50, 60, 80, 80]


@pytest.mark.parametrize("changed", ["runtime", "job_folder", "base_model"])
def test_execution_of_something_else_begins_anew_in_an_empty_folder(workspace: Workspace, changed: str) -> None:
    first = workspace.resume_or_create(SUBJECT)
    workspace.journal.write_text("")
    (workspace.runtime / "states").mkdir(parents=True)
    other = workspace.resume_or_create({**SUBJECT, changed: "other"})
    assert other.id != first.id
    assert [path.name for path in workspace.folder.iterdir()] == ["execution.json"]


def test_what_mlflow_is_to_know_stays_for_the_next_execution(workspace: Workspace) -> None:
    workspace.resume_or_create(SUBJECT)
    workspace.tracking_record.write_text("{}")
    workspace.end()
    workspace.resume_or_create(SUBJECT)
    assert workspace.tracking_record.exists()


def test_each_subject_has_a_workspace_of_its_own(tmp_path: Path) -> None:
    workspaces = Workspaces(tmp_path / "flare" / "fedavg")
    folders = {workspaces.of({**SUBJECT, name: "other"}).folder for name in SUBJECT}
    assert len({*folders, workspaces.of(SUBJECT).folder}) == 4
    assert workspaces.of(dict(reversed(SUBJECT.items()))).folder == workspaces.of(SUBJECT).folder


_HOLD = """
import sys, time
from pathlib import Path
from fedsft_assets.federation.supervisor.workspace import Workspace
with Workspace(Path(sys.argv[1])).held():
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_process_at_a_time_works_in_a_workspace_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    workspaces = Workspaces(tmp_path / "flare")
    workspace = workspaces.of(SUBJECT)
    waits = []
    workspace.folder.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(workspace.folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert list(workspaces.abandoned()) == []
        with pytest.raises(BlockingIOError), workspace.held(wait=False):
            pass
        with workspace.held(waiting=lambda: waits.append(other.kill())):
            assert len(waits) == 1
    assert [found.folder for found in workspaces.abandoned()] == [workspace.folder]


def test_ended_execution_is_not_taken_up_again(workspace: Workspace) -> None:
    first = workspace.resume_or_create(SUBJECT)
    workspace.journal.write_text("")
    workspace.end()
    assert workspace.execution() == replace(first, ended=True)
    assert workspace.journal.exists()
    again = workspace.resume_or_create(SUBJECT)
    assert again.id != first.id
    assert not workspace.journal.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"id": "1", "subject": {}, "colour": "red"}', '{"id": "1"}'])
def test_record_of_another_version_is_nothing_to_go_on_with(workspace: Workspace, content: str) -> None:
    workspace.folder.mkdir(parents=True)
    (workspace.folder / "execution.json").write_text(content)
    assert workspace.execution() is None
    assert workspace.resume_or_create(SUBJECT).subject == SUBJECT


def test_every_execution_has_an_id_of_its_own(tmp_path: Path) -> None:
    assert len({Workspace(tmp_path / str(k)).resume_or_create(SUBJECT).id for k in range(20)}) == 20


def test_every_submission_of_every_execution_has_a_token_of_its_own(tmp_path: Path) -> None:
    begun = [Workspace(tmp_path / str(k)).resume_or_create(SUBJECT) for k in range(3)]
    assert len({replace(one, submissions=k).token for one in begun for k in (1, 2, 3)}) == 9
    assert begun[0].token == replace(begun[0], job_id="7", rounds=3).token


def test_record_is_json_that_says_what_is_executed(workspace: Workspace) -> None:
    execution = workspace.save(Execution("id-1", SUBJECT, job_id="é"))
    assert json.loads((workspace.folder / "execution.json").read_text())["subject"] == SUBJECT
    assert workspace.execution() == execution
    assert [path.name for path in workspace.folder.iterdir()] == ["execution.json"]
