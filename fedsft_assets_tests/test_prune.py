"""Pruning: what is current, latest, registered or in use stays with all that it was made of; the rest goes."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.execution import CheckpointInputs
from fedsft_assets.federation.job_folder import JobFolder, build_job_folder
from fedsft_assets.federation.supervisor.launch import held_workspace
from fedsft_assets.federation.supervisor.workspace import Workspaces
from fedsft_assets.prune import remove
from fedsft_assets.prune import unneeded as unneeded_by_default
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import SPLITS, Store, split_file
from fedsft_assets.versions import Verdict, adding, current, judge, make_current, read_verdict, versions_of
from fedsft_assets_tests.prepared import made_current

TINY = PRESETS["tiny"]
unneeded = partial(unneeded_by_default, last=0)
SPEC = JobSpec(name="quick", description="", rounds=1, sites={"site-1": SiteSpec(dataset="dolly")})


class Home:
    """A home in which everything is made again and again, each time another one."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def make(self, content: str) -> dict[str, Path]:
        """Make everything, from splits to a checkpoint; the versions by their kind."""
        store = self.store
        processed = self._splits(store.processed("dolly"), content, {})
        combined = self._splits(store.combined, content, {"dolly": processed.name})
        with made_current(store.base_model("tiny")) as folder:
            (folder / "tiny.nemo").write_text(content)
        job_folder = build_job_folder(SPEC, TINY, store).folder
        with adding(store.checkpoint("quick")) as addition:
            (addition.folder / "model.nemo").write_text(content)
            CheckpointInputs.of(JobFolder.read(job_folder)).write(addition.folder)
        make_current(addition.version)
        return {
            "processed": processed,
            "combined": combined,
            "base model": current(store.base_model("tiny")),
            "job folder": job_folder,
            "checkpoint": addition.version,
        }

    def _splits(self, versions: Path, content: str, parts: dict[str, str]) -> Path:
        with adding(versions) as addition:
            for split in SPLITS:
                split_file(addition.folder, split).write_text(f'{{"input": "{content}", "output": "{split}"}}\n')
            counts = dict.fromkeys(SPLITS, 1)
            report = SplitReport.of(
                versions.name, {}, SplitSettings(), counts=counts, rows=3, duplicates=0, parts=parts
            )
            report.write(addition.folder)
        judge(addition.version, Verdict())
        return addition.version

    def execute(self) -> Path:
        """Begin and end an execution of the current job folder; gives its workspace."""
        store = self.store
        job = JobFolder.read(current(store.job_folder("quick")))
        with held_workspace(job, store.flare("quick"), "poc") as (workspace, _):
            workspace.end()
        return workspace.folder


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(Store(tmp_path / "home"))


def _paths(found: object) -> set[Path]:
    return {one.path for one in found}  # type: ignore[attr-defined]


def test_what_is_current_stays_and_what_was_before_goes(home: Home) -> None:
    old, new = home.make("1"), home.make("2")
    found = unneeded(home.store, [], [])
    assert _paths(found) == set(old.values())
    assert remove(found) == found
    assert not any(path.exists() for path in old.values())
    assert read_verdict(old["processed"]) is None
    assert all(path.is_dir() for path in new.values())
    assert unneeded(home.store, [], []) == []


def test_last_three_checkpoints_of_a_job_stay_with_all_that_they_were_made_of(home: Home) -> None:
    made = [home.make(content) for content in "12345"]
    for age, versions in enumerate(reversed(made)):
        os.utime(versions["checkpoint"], (0, 1e9 - age))
    assert _paths(unneeded_by_default(home.store, [], [])) == {*made[0].values(), *made[1].values()}


@pytest.mark.parametrize("why", ["registered", "in use"])
def test_a_checkpoint_that_is_needed_keeps_all_that_it_was_made_of(home: Home, why: str) -> None:
    first, second = home.make("1"), home.make("2")
    home.make("3")
    needed = [first["checkpoint"]]
    found = unneeded(home.store, needed, []) if why == "registered" else unneeded(home.store, [], needed)
    assert _paths(found) == set(second.values())


def test_the_latest_execution_keeps_its_workspace_and_what_it_is_of(home: Home) -> None:
    first = home.make("1")
    earlier = home.execute()
    second = home.make("2")
    latest = home.execute()
    home.make("3")
    assert _paths(unneeded(home.store, [], [])) == {*first.values(), second["checkpoint"], earlier}
    remove(unneeded(home.store, [], []))
    assert not earlier.exists()
    assert latest.is_dir()


def test_a_workspace_in_which_somebody_works_stays(home: Home) -> None:
    home.make("1")
    store, folder = home.store, current(home.store.job_folder("quick"))
    with held_workspace(JobFolder.read(folder), store.flare("quick"), "poc") as (workspace, execution):
        home.make("2")
        home.execute()
        workspace.save(replace(execution, rounds=0))
        assert workspace.folder not in _paths(unneeded(store, [], []))
    latest = Workspaces(store.flare("quick")).latest()
    assert latest is not None


def test_what_is_made_again_after_it_was_listed_stays(home: Home) -> None:
    old = home.make("1")
    home.make("2")
    found = unneeded(home.store, [], [])
    home.make("1")
    gone = _paths(remove(found))
    assert old["processed"] not in gone
    assert old["processed"].is_dir()
    assert current(home.store.processed("dolly")) == old["processed"]


def test_the_command_lists_first_and_removes_only_when_told(home: Home, tmp_path: Path) -> None:
    old = home.make("1")
    home.make("2")

    def prune(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fedsft_assets.cli", "prune", "--keep", "0", *arguments]
        environment = {"PATH": "/usr/bin:/bin", "FEDSFT_HOME": str(home.store.home), "HOME": str(tmp_path)}
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )

    asked = prune()
    assert asked.returncode != 0
    assert "nothing removed; use --yes to remove them" in asked.stderr
    for path in old.values():
        assert str(path.relative_to(home.store.home)) in asked.stdout
    assert prune("--dry-run").returncode == 0
    assert all(path.is_dir() for path in old.values())
    removed = prune("--yes")
    assert removed.returncode == 0, removed.stderr
    assert removed.stdout.splitlines()[-1].startswith("removed 5, ")
    assert versions_of(home.store.splits(COMBINED)) == [current(home.store.combined)]
