"""Finds and removes what a home no longer needs: versions behind nothing that is current, latest or registered.

Plain Python: the caller provides the versions in use by Dagster runs and the registered checkpoints.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.execution import CheckpointInputs
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.supervisor.workspace import Workspace, Workspaces
from fedsft_assets.files import locked
from fedsft_assets.store import Store
from fedsft_assets.versions import CURRENT, current, remove_version, versions_of

LAST_CHECKPOINTS = 3
_GROUPS = ("raw", "processed", "base_models", "job_folders", "checkpoints", "evaluations", "reports")


@dataclass(frozen=True)
class Unneeded:
    """A version, or the workspace of an execution, with its size on disk in bytes."""

    path: Path
    bytes: int
    modified: float


def unneeded(
    store: Store, registered: Iterable[Path], in_use: Iterable[Path], last: int = LAST_CHECKPOINTS
) -> list[Unneeded]:
    """Versions and workspaces that can be removed, by path.

    Kept are current versions, those of each job's latest execution, the newest `last` checkpoints of each job,
    `registered` ones, versions `in_use` by running Dagster runs, and everything that these were made from. Idle
    workspaces are removed if their execution is not the job's latest.
    """
    families = list(_families(store))
    roots = [current(folder) for folder in families if (folder / CURRENT).is_symlink()]
    jobs = list((store.home / "flare").glob("*/"))
    latest = [workspace for folder in jobs if (workspace := Workspaces(folder).latest())]
    for workspace in latest:
        execution = workspace.execution()
        if execution and "job_folder" in execution.subject:
            roots += (store.home / "job_folders").glob(f"*/{execution.subject['job_folder']}")
    for folder in (store.home / "checkpoints").glob("*/"):
        roots += versions_of(folder)[:last]
    needed = _with_origins(store, [*roots, *registered, *in_use])
    old = [version for folder in families for version in versions_of(folder) if version not in needed]
    over = [other.folder for folder in jobs for other in _idle(Workspaces(folder), latest)]
    return [_measured(path) for path in sorted([*old, *over])]


def remove(found: Iterable[Unneeded]) -> list[Unneeded]:
    """Remove them, except those used again since they were found; returns what was removed."""
    gone = []
    for one in found:
        if one.path.parent.parent.name == "flare":
            workspace = Workspace(one.path)
            try:
                with workspace.held(wait=False):
                    shutil.rmtree(one.path)
                    workspace.tracking_record.unlink(missing_ok=True)
                    one.path.with_suffix(".err").unlink(missing_ok=True)
            except BlockingIOError:
                continue
        else:
            with locked(one.path.parent):
                if one.path.stat().st_mtime != one.modified:
                    continue
                remove_version(one.path)
        gone.append(one)
    return gone


def _families(store: Store) -> Iterator[Path]:
    """The folders that contain versions."""
    yield store.combined
    for group in _GROUPS:
        yield from sorted((store.home / group).glob("*/"))


def _with_origins(store: Store, versions: Iterable[Path]) -> set[Path]:
    """These versions and everything that they were made from, as far as it exists."""
    needed: set[Path] = set()
    waiting = list(versions)
    while waiting:
        version = waiting.pop()
        if version in needed or not version.is_dir():
            continue
        needed.add(version)
        waiting += _origins(store, version)
    return needed


def _origins(store: Store, version: Path) -> list[Path]:
    family = version.parent
    if family == store.combined:
        return [store.processed(name) / digest for name, digest in SplitReport.read(version).parts.items()]
    if family.parent.name == "checkpoints":
        inputs = CheckpointInputs.read(version)
        return [store.home / inputs.job_folder, (store.home / inputs.base_model).parent, inputs.combined(store)]
    if family.parent.name == "job_folders":
        plans = JobFolder.read(version).located_plans
        return [path.parent for plan in plans for path in (plan.base_model, plan.training_file, plan.validation_file)]
    return []


def _idle(workspaces: Workspaces, latest: list[Workspace]) -> Iterator[Workspace]:
    """Unused workspaces other than the latest."""
    kept = {workspace.folder for workspace in latest}
    return (other for other in workspaces.abandoned() if other.folder not in kept)


def _measured(path: Path) -> Unneeded:
    size = sum(file.lstat().st_size for file in path.rglob("*") if file.is_file() and file.lstat().st_nlink == 1)
    return Unneeded(path, size, path.stat().st_mtime)
