"""The POC as Dagster jobs: up with one, ended with the other, and both say how it is then."""

from pathlib import Path

import dagster as dg
import pytest

from fedsft_assets.defs.poc_jobs import poc_start_job, poc_stop_job
from fedsft_assets.defs.resources import resources
from fedsft_assets.federation.runtimes.choose import poc_system
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.settings import Settings
from fedsft_assets.specs.runtime import RuntimeSettings

pytestmark = pytest.mark.slow


def _state(result: dg.ExecuteInProcessResult) -> object:
    (event,) = [
        event for event in result.all_node_events if event.step_key == "poc_status" and event.is_successful_output
    ]
    return event.step_output_data.metadata["state"].value


def test_dagster_brings_the_poc_up_and_ends_it_in_the_home_of_the_launchpad(tmp_path: Path) -> None:
    settings, home = Settings(home=tmp_path / "settings"), tmp_path / "launchpad"
    offered = resources(settings, ["site-1", "site-2"])
    in_the_launchpad = {"resources": {"store": {"config": {"home": str(home)}}}}
    system = poc_system(home, RuntimeSettings())
    try:
        up = poc_start_job.execute_in_process(run_config=in_the_launchpad, resources=offered)
        assert up.success
        assert _state(up) == "running"
        assert list(system.status().services) == ["localhost", "site-1", "site-2"]
    finally:
        ended = poc_stop_job.execute_in_process(run_config=in_the_launchpad, resources=offered)
    assert _state(ended) == "stopped"
    assert marked_processes(system.mark) == []
    assert not settings.home.exists()
