"""The command `fedsft study`: the whole study from a terminal."""

import os
import shutil
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedsft_assets.defs.run import execute
from fedsft_assets.defs.seeds import of_study
from fedsft_assets.defs.study_jobs import COMPARE, FULL_STUDY, PREPARE_DATA, TRAIN
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import stop_marked
from fedsft_assets.files import publish_file
from fedsft_assets.home import claim_home
from fedsft_assets.home_file import HomeError
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.tracking.relocation import relocate


def prepare_instance(settings: Settings) -> None:
    """Create the Dagster instance of FEDSFT_HOME with the project's settings, and use it in this process.

    Binds the home to these settings. Raises HomeError if it is bound to others, or if this installation cannot work.
    """
    if "%" in (packages := sysconfig.get_path("purelib")):
        raise HomeError(
            f"{packages}: MLflow cannot create a database if it is installed in a folder with '%' in its path; move the"
            " clone to a path without '%' and set it up again there"
        )
    claim_home(settings, lambda old: _move(settings, old))
    folder = settings.home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    with publish_file(folder / "dagster.yaml") as fresh:
        shutil.copyfile(PROJECT / "dagster.yaml", fresh)
    os.environ.update(home_environment(settings.home))


def _move(settings: Settings, old: Path) -> None:
    if not old.exists():  # moved, not copied: processes still running there have lost their files
        stop_marked(PocSystem(old / "poc", settings.poc, {}).mark)
    changed = relocate(settings.store, old)
    print(f"this home was moved from {old} to {settings.home}; updated {changed} paths in MLflow's records")


def full_study() -> Any:
    """The Dagster job of this name; step processes call this to reconstruct it, and the others below."""
    return _job(FULL_STUDY)


def prepare_data() -> Any:
    return _job(PREPARE_DATA)


def train() -> Any:
    return _job(TRAIN)


def compare() -> Any:
    return _job(COMPARE)


def _job(name: str) -> Any:
    from fedsft_assets.definitions import defs

    return defs.resolve_job_def(name)


def study_run_config(overrides: dict[str, Any], jobs: Sequence[JobSpec], sites: int) -> dict[str, Any]:
    """The Dagster run config that applies these overrides to every job folder; None values are ignored.

    A centralized job gets `max_local_steps` times the number of sites, so that it trains on as many records as all
    sites together.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    ops: dict[str, Any] = {}
    for job in jobs if given else ():
        config = dict(given)
        if job.kind == "centralized" and "max_local_steps" in config:
            config["max_local_steps"] *= sites
        ops[f"job_folder__{job.name}"] = {"config": config}
    return {"ops": ops}


def run_study(overrides: dict[str, Any], settings: Settings) -> str:
    """Materialize all assets, seed by seed if there are several; `overrides` are fields of JobOverrides, set for every
    job folder.

    Returns the id of the Dagster run with the comparison. Raises StudyFailedError.
    """
    from fedsft_assets.definitions import datasets, jobs

    config = study_run_config(overrides, jobs, sites=len(datasets))
    if not settings.seeds:
        return execute(full_study, config, settings)
    runs = [execute(prepare_data, {}, settings)]
    for seed in settings.seeds:
        print(f"\nseed {seed}", flush=True)
        runs.append(execute(train, config, settings, of_study(runs[:1], seed)))
    return execute(compare, {}, settings, of_study(runs))
