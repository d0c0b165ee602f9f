"""Which files a site trains on: its own, those that the plan means, and never any other."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsft_assets.data.sources.sample import write_sample
from fedsft_assets.federation.site.files import SITE_HOME, with_own_files
from fedsft_assets.files import file_digest
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.job import TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets_tests.data.hub_server import HubServer
from fedsft_assets_tests.shipped import DATASETS
from fedsft_assets_tests.watched import open_to_others

DIGEST = "0123" * 16  # of whatever the study has
FILES = {
    "training_file": "datasets/support/training.jsonl",
    "validation_file": "datasets/combined/validation.jsonl",
    "base_model": "base_models/tiny.nemo",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A site's folder with all that a job needs."""
    home = tmp_path / "site"
    for name in FILES.values():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(json.dumps({"input": name, "output": "x"}) + "\n")
    return home


@pytest.fixture
def plan(home: Path) -> SitePlan:
    """As the study built it: with its own paths, and the digests of the files that it has."""
    return SitePlan(
        job="fedavg",
        site="site-1",
        rounds=2,
        local_epochs=1,
        max_local_steps=None,
        max_evaluation_records=None,
        seed=1,
        training=PRESETS["tiny"].resolve(TrainingSpec()),
        training_file=Path(f"processed/support/{DIGEST}/training.jsonl"),
        validation_file=Path(f"combined/{DIGEST}/validation.jsonl"),
        base_model=Path(f"base_models/tiny/{DIGEST}/tiny.nemo"),
        digests={"validation_file": file_digest(home / FILES["validation_file"])},
    )


def at(home: Path | str) -> dict[str, str]:
    return {SITE_HOME: str(home)}


def _with(plan: SitePlan, **changes: object) -> SitePlan:
    return plan.model_copy(update=changes)


def test_a_site_uses_its_own_files_of_the_names_in_the_plan(plan: SitePlan, home: Path) -> None:
    own = with_own_files(plan, at(home))
    assert {field: getattr(own, field) for field in FILES} == {field: home / name for field, name in FILES.items()}
    assert own.model_dump(exclude=set(FILES)) == plan.model_dump(exclude=set(FILES))


def test_training_data_that_the_study_has_never_seen_needs_no_digest(plan: SitePlan, home: Path) -> None:
    (home / FILES["training_file"]).write_text('{"input": "new", "output": "row"}\n')
    assert "training_file" not in plan.digests
    assert with_own_files(plan, at(home)).training_file == home / FILES["training_file"]


@pytest.mark.parametrize("field", FILES)
def test_a_file_that_is_missing_is_named_with_what_to_do(plan: SitePlan, home: Path, field: str) -> None:
    (home / FILES[field]).unlink()
    with pytest.raises(SpecError) as raised:
        with_own_files(plan, at(home))
    assert str(raised.value).startswith(f"site-1: {field}: {home / FILES[field]} is missing; ")
    assert ("fedsft-site split support.yaml" in str(raised.value)) == (field == "training_file")


@pytest.mark.parametrize("field", FILES)
def test_a_file_with_other_content_than_the_job_was_built_for_is_refused(
    plan: SitePlan, home: Path, field: str
) -> None:
    path = home / FILES[field]
    built_for = _with(plan, digests={field: file_digest(path)})
    with_own_files(built_for, at(home))
    path.write_text("changed\n")
    with pytest.raises(SpecError, match=f"site-1: {field}: .* has the SHA-256 {file_digest(path)}"):
        with_own_files(built_for, at(home))


@pytest.mark.parametrize(
    ("field", "path", "expected"),
    [
        ("training_file", "/etc/secrets/0/passwd", "is not a split file"),
        ("training_file", "../0/training.jsonl", "is not a plain name"),
        ("training_file", "/x/.ssh/0/training.jsonl", "is not a plain name"),
        ("training_file", "training.jsonl", "is not a plain name"),
        ("validation_file", "/x/combined/0/other.jsonl", "is not a split file"),
        ("base_model", "/x/model.bin", "is not a .nemo archive"),
        ("base_model", "/x/..", "is not a plain name"),
    ],
)
def test_a_plan_can_name_nothing_outside_of_the_sites_folder(
    plan: SitePlan, home: Path, field: str, path: str, expected: str
) -> None:
    with pytest.raises(SpecError, match=expected):
        with_own_files(_with(plan, **{field: Path(path)}), at(home))


@pytest.mark.parametrize("said", ["relative/folder", "/nowhere/at/all"])
def test_a_site_home_that_is_no_folder_is_named(plan: SitePlan, said: str) -> None:
    with pytest.raises(SpecError, match=f"{SITE_HOME}: '{said}' is not a folder"):
        with_own_files(plan, at(said))


def test_without_a_site_home_the_plan_holds_as_it_is_and_is_checked(plan: SitePlan, home: Path) -> None:
    here = _with(plan, **{field: home / name for field, name in FILES.items()})
    assert with_own_files(here, {}) == here
    (home / FILES["validation_file"]).unlink()
    with pytest.raises(SpecError, match="validation_file"):
        with_own_files(here, {})


def _fedsft_site(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedsft_assets.cli.site", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **at(home)})


def test_the_command_splits_a_sites_own_data_as_the_study_would(tmp_path: Path) -> None:
    from fedsft_assets.data.sources.fetch import fetch
    from fedsft_assets.data.splits import split_dataset
    from fedsft_assets.specs.dataset import DatasetSpec

    rows = "\n".join(f"question {k},answer {k}" for k in range(200))
    (tmp_path / "tickets.csv").write_text(f"question,answer\n{rows}\n")
    dataset = tmp_path / "support.yaml"
    dataset.write_text("path: tickets.csv\ncolumns: {instruction: question, response: answer}\n")
    site = tmp_path / "site"
    site.mkdir()
    done = _fedsft_site(site, "split", str(dataset))
    assert done.returncode == 0, done.stderr

    spec = DatasetSpec.load(dataset)
    fetch(spec, "hub", into=tmp_path / "raw", downloads=tmp_path / "downloads")
    split_dataset(spec, tmp_path / "raw", tmp_path / "study")
    for split in ("training", "validation", "testing"):
        made = site / "datasets/support" / f"{split}.jsonl"
        assert made.read_bytes() == (tmp_path / "study" / f"{split}.jsonl").read_bytes()
    shown = _fedsft_site(site, "show")
    assert f"{file_digest(made)}  datasets/support/testing.jsonl" in shown.stdout
    assert "3 splits and 0 base models" in shown.stderr


def test_the_command_downloads_a_published_dataset_and_requests_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dolly, cache, site = DATASETS["dolly"], tmp_path / "cache", tmp_path / "site"
    assert dolly.hub
    write_sample("dolly", tmp_path / "dolly")
    site.mkdir()
    monkeypatch.setenv("HF_HOME", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer({dolly.hub: tmp_path / "dolly"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        done = _fedsft_site(site, "split", str(PROJECT / "datasets/dolly.yaml"))
    assert done.returncode == 0, done.stderr
    assert (site / "datasets/dolly/training.jsonl").is_file()
    assert {Path(request.path).name for request in server.requests} == set(dolly.file_names)
    assert not cache.exists()


def test_the_command_says_what_a_job_would_use(plan: SitePlan, home: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(plan.model_dump_json())
    done = _fedsft_site(home, "check", str(path))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["training_file"] == str(home / FILES["training_file"])
    assert said["without a digest"] == ["base_model", "training_file"]
    (home / FILES["base_model"]).unlink()
    done = _fedsft_site(home, "check", str(path))
    assert done.returncode == 1
    assert "base_model" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configured_kit_allows_one_trainer_no_code_and_the_gpus_that_it_is_told(tmp_path: Path) -> None:
    from fedsft_assets.federation.site.executor import InstalledTrainer
    from fedsft_assets_tests.provisioned import provision

    kit = provision(tmp_path, sites=["site-1"]).sites["site-1"]
    done = _fedsft_site(tmp_path, "configure", str(kit), "--gpus", "2", "--gpu-memory", "40", "--keep-logs")
    assert done.returncode == 0, done.stderr
    resources = json.loads((kit / "local/resources.json").read_text())
    assert resources["class_allow_list"] == [f"{InstalledTrainer.__module__}.{InstalledTrainer.__qualname__}"]
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False
    (manager,) = (one for one in resources["components"] if one["id"] == "resource_manager")
    assert (manager["args"]["num_of_gpus"], manager["args"]["mem_per_gpu_in_GiB"]) == (2, 40)
    (lead,) = json.loads((kit / "local/authorization.json").read_text())["permissions"].values()
    assert lead["byoc"] == "none"
    assert not {"shell_commands", "operate"} & set(lead)

    assert _fedsft_site(tmp_path, "configure", str(kit)).returncode == 0
    resources = json.loads((kit / "local/resources.json").read_text())
    assert [name.split(".")[-1] for name in resources["class_allow_list"]] == ["InstalledTrainer", "JobLogStreamer"]
    assert resources["allow_log_streaming"] is True

    done = _fedsft_site(tmp_path, "configure", str(tmp_path))
    assert done.returncode == 1
    assert "startup/fed_client.json is missing" in done.stderr


def test_a_configured_kit_and_the_sites_files_are_closed_to_others(tmp_path: Path) -> None:
    """As somebody has unpacked them without a thought."""
    kit, home = tmp_path / "kit", tmp_path / "home"
    (home / "datasets" / "alpaca").mkdir(parents=True)
    (home / "datasets" / "alpaca" / "training.jsonl").write_text("{}")
    (home / "something else").mkdir()
    for folder in ("startup", "local"):
        (kit / folder).mkdir(parents=True)
    (kit / "startup" / "fed_client.json").write_text("{}")
    (kit / "startup" / "client.key").write_text("a key")
    (kit / "local" / "resources.json.default").write_text('{"components": []}')
    for path in [kit, *kit.rglob("*"), home, *home.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    done = _fedsft_site(home, "configure", str(kit))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == (
        f"{kit}: this startup kit was open to other accounts of this computer; access removed. Anyone who has read"
        " client.key can impersonate it: have it provisioned again"
    )
    assert done.stderr == f"{home}: was open to other accounts of this computer; access removed\n"
    assert open_to_others(kit) == []
    assert open_to_others(home) == [home / "something else"]
    again = _fedsft_site(home, "configure", str(kit))
    assert (again.stderr, len(again.stdout.splitlines())) == ("", 2)


def test_what_starts_the_trainer_takes_no_command_from_a_job() -> None:
    from fedsft_assets.federation.site.executor import InstalledTrainer

    with pytest.raises(TypeError):
        InstalledTrainer(command=["sh", "-c", "anything"])  # type: ignore[call-arg]
