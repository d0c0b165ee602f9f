"""The whole code location: every change of the graph shows in `graph.json`, and loading it loads nothing heavy."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fedsft_assets.cli.ui.start import ASSET_GROUPS
from fedsft_assets.definitions import defs
from fedsft_assets.settings import PROJECT

GRAPH_FILE = Path(__file__).with_name("graph.json")
RENEW = "RENEW_GRAPH"


def _graph() -> dict[str, Any]:
    """What the code location offers, as plain values in a fixed order."""
    graph = defs.resolve_asset_graph()
    repository = defs.get_repository_def()
    assets = {}
    for key in sorted(graph.get_all_asset_keys(), key=dg.AssetKey.to_user_string):
        node = graph.get(key)
        op = defs.resolve_assets_def(key).op
        assets[key.to_user_string()] = {
            "deps": sorted(parent.to_user_string() for parent in node.parent_keys),
            "description": node.description,
            "group": node.group_name,
            "kinds": sorted(node.kinds),
            "op": op.name,
            "op_tags": dict(sorted(op.tags.items())),
            "pool": op.pool,
            "checks": sorted(check.name for check in graph.get_check_keys_for_assets({key})),
        }
    return {
        "assets": assets,
        "jobs": {
            job.name: sorted(key.to_user_string() for key in job.asset_layer.executable_asset_keys)
            for job in sorted(repository.get_all_jobs(), key=lambda job: job.name)
            if not job.name.startswith("__")
        },
        "schedules": {
            schedule.name: {
                "cron": schedule.cron_schedule,
                "job": schedule.job_name,
                "status": schedule.default_status.value,
            }
            for schedule in repository.schedule_defs
        },
        "sensors": {
            sensor.name: {"seconds": sensor.minimum_interval_seconds, "status": sensor.default_status.value}
            for sensor in repository.sensor_defs
        },
        "resources": sorted(repository.get_top_level_resources()),
    }


def test_graph_is_the_committed_one() -> None:
    graph = json.dumps(_graph(), indent=2, ensure_ascii=False) + "\n"
    if os.environ.get(RENEW):
        GRAPH_FILE.write_text(graph, encoding="utf-8")
    assert GRAPH_FILE.read_text(encoding="utf-8") == graph, (
        f"the asset graph has changed; if that is meant, run `{RENEW}=1 pytest {Path(__file__).relative_to(PROJECT)}`"
        f" and commit {GRAPH_FILE.relative_to(PROJECT)}"
    )


def test_user_interface_opens_with_all_groups_of_assets() -> None:
    groups = {spec.group_name for spec in defs.resolve_all_asset_specs()}
    assert groups == set(ASSET_GROUPS)


def test_every_checkpoint_waits_for_a_gpu_and_nothing_else_does() -> None:
    graph = _graph()["assets"]
    waiting = {key for key, asset in graph.items() if asset["pool"] == "gpu"}
    assert waiting == {key for key in graph if key.startswith("checkpoint/")}
    for key in waiting:
        tags = graph[key]["op_tags"]
        assert tags["fedsft/needs"] == "gpu"
        container = json.loads(tags["dagster-k8s/config"])["container_config"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}


def test_every_asset_has_a_group_a_kind_and_a_description() -> None:
    for key, asset in _graph()["assets"].items():
        assert asset["group"] not in (None, "default"), key
        assert asset["kinds"], key
        assert asset["description"], key


def test_definitions_can_be_loaded() -> None:
    dg.Definitions.validate_loadable(defs)


def test_dagsters_own_command_selects_assets() -> None:
    """With selections of its grammar, for which NeMo's own requirements have too old an antlr."""
    command = [sys.executable, "-m", "dagster", "asset", "list", "-m", "fedsft_assets.definitions", "--select"]
    for selection, expected in {
        'key:"checkpoint/fedavg"+': {"checkpoint/fedavg", "evaluation/fedavg", "comparison", "inference"},
        'group:"processed" and not key:"processed/alpaca"': {"processed/dolly", "processed/oasst1"},
    }.items():
        done = subprocess.run([*command, selection], capture_output=True, text=True, check=True, cwd=PROJECT)
        assert set(done.stdout.splitlines()) == expected


def _loaded_by(module: str) -> set[str]:
    """The top-level packages in a new process that has imported the module."""
    script = f"import sys, {module}\nprint('loaded:', *(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PROJECT)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("loaded: "))
    return set(line.split()[1:])


def test_code_location_loads_without_anything_heavy() -> None:
    loaded = _loaded_by("fedsft_assets.definitions")
    assert "dagster" in loaded
    assert not loaded & {
        "torch",
        "nemo",
        "nvflare",
        "mlflow",
        "transformers",
        "lightning",
        "matplotlib",
        "pandas",
        "tokenizers",
        "py3langid",
    }


@pytest.mark.slow
def test_trainer_at_a_site_needs_nothing_of_dagster_or_mlflow() -> None:
    # The process begins as the client, and loads the trainer when it knows its plan.
    loaded = _loaded_by("fedsft_assets.federation.site.process") | _loaded_by("fedsft_assets.federation.site.trainer")
    assert {"nvflare", "torch"} <= loaded
    assert not loaded & {"dagster", "dagster_shared", "mlflow"}
