"""The asset `inference`: all models of a study answer, in the order of the comparison."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fedsft_assets.defs.assets.inference import inference_asset
from fedsft_assets.defs.resources import resources
from fedsft_assets.evaluation.answers import Answers
from fedsft_assets.evaluation.prompts import ExamplePrompt
from fedsft_assets.evaluation.report.study import kept_answers
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.files import file_digest
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.job import JobSpec, load_jobs
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import Store, archive_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import made_current
from fedsft_assets_tests.shipped import DATASETS

QUESTIONS = [ExamplePrompt(question="Say | it."), ExamplePrompt(question="Why?", context="It is so.")]


@pytest.fixture(scope="module")
def jobs() -> list[JobSpec]:
    return load_jobs(PROJECT / "jobs", list(DATASETS))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, jobs: list[JobSpec]) -> Store:
    """A home with a tiny base model, and an archive of other weights for every job."""
    import torch

    from fedsft_assets.model.base_model import create_base_model

    torch.set_num_threads(1)
    store = Store(tmp_path_factory.mktemp("home"))
    archives = [(store.base_model("tiny"), "tiny.nemo"), *((store.checkpoint(job.name), MODEL_FILE) for job in jobs)]
    for seed, (versions, name) in enumerate(archives):
        with made_current(versions) as folder:
            create_base_model(PRESETS["tiny"], folder / name, seed, ["Say it. It is so. Why?"])
    return store


@pytest.fixture
def materialize(store: Store, jobs: list[JobSpec]) -> Callable[..., dg.ExecuteInProcessResult]:
    keys = [dg.AssetKey("base_model"), *(dg.AssetKey(["checkpoint", job.name]) for job in jobs)]
    there = [dg.AssetSpec(key).with_io_manager_key("io_manager") for key in keys]

    def run(home: Path = store.home, **config: Any) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            [*there, inference_asset(jobs, QUESTIONS)],
            resources=resources(Settings(home=home)),
            run_config={"ops": {"inference": {"config": {"max_new_tokens": 6, **config}}}},
            raise_on_error=False,
        )

    return run


def _metadata(result: dg.ExecuteInProcessResult) -> dict[str, Any]:
    (materialization,) = result.asset_materializations_for_node("inference")
    return {name: value.value for name, value in materialization.metadata.items()} | {"tags": materialization.tags}


def test_it_comes_after_the_base_model_and_every_checkpoint(jobs: list[JobSpec]) -> None:
    asset = inference_asset(jobs, QUESTIONS)
    upstream = {key.to_user_string() for key in asset.asset_deps[asset.key]}
    assert upstream == {"base_model", *(f"checkpoint/{job.name}" for job in jobs)}


def test_all_models_answer_side_by_side(store: Store, materialize: Callable[..., dg.ExecuteInProcessResult]) -> None:
    from fedsft_assets.model.language_model import LanguageModel

    config = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}
    found = _metadata(materialize(**config))
    table = current(store.report("inference")) / "inference.md"
    assert (found["models"], found["prompts"], found["path"]) == (6, 2, str(table))
    settings = GenerationSettings(12, temperature=1.0, seed=3)
    archives = {"base model": archive_file(current(store.base_model("tiny")))}
    archives |= {
        job: current(store.checkpoint(job)) / MODEL_FILE for job in ("alpaca", "dolly", "oasst1", "combined", "fedavg")
    }
    models = {
        name: LanguageModel.load(path).generate(["Say | it.", "It is so.\n\nWhy?"], settings)
        for name, path in archives.items()
    }
    assert len(set(map(tuple, models.values()))) == 6
    assert found["answers"] == Answers(QUESTIONS, models, settings).markdown()
    assert table.read_text(encoding="utf-8") == found["answers"] + "\n"
    assert found["tags"]["dagster/data_version"] == file_digest(table)
    versions = {job: current(store.checkpoint(job)).name for job in ("alpaca", "dolly", "oasst1", "combined", "fedavg")}
    kept = kept_answers(store, versions)
    assert kept is not None
    assert kept.markdown() == found["answers"]
    assert kept_answers(store, {**versions, "fedavg": "another version"}) is None


def test_other_prompts_and_sampling_can_be_asked_for(
    materialize: Callable[..., dg.ExecuteInProcessResult],
) -> None:
    asked = {"prompts": [{"question": "Really?"}], "temperature": 1.0, "seed": 5}
    found = _metadata(materialize(**asked))
    assert found["answers"].startswith("|  | Really? |\n")
    assert "Sampled at temperature 1 with seed 5, at most 6 new tokens." in found["answers"]
    assert _metadata(materialize(**asked))["answers"] == found["answers"]
    assert _metadata(materialize(**{**asked, "seed": 6}))["answers"] != found["answers"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"prompts": [{"question": " "}]}, "launchpad: prompts.0.question: String should have at least 1 character"),
        ({"prompts": []}, "launchpad: prompts: List should have at least 1 item"),
        ({"temperature": -1.0}, "temperature: expected 0 (greedy) or more, found -1.0"),
    ],
)
def test_what_cannot_be_asked_is_said(
    materialize: Callable[..., dg.ExecuteInProcessResult], config: dict[str, Any], said: str
) -> None:
    result = materialize(**config)
    assert not result.success
    (failure,) = (event for event in result.all_node_events if event.is_step_failure)
    user_failure = failure.step_failure_data.user_failure_data
    assert user_failure is not None
    assert said in (user_failure.description or "")


def test_a_missing_checkpoint_is_named(materialize: Callable[..., dg.ExecuteInProcessResult], tmp_path: Path) -> None:
    result = materialize(home=tmp_path)
    (failure,) = (event for event in result.all_node_events if event.is_step_failure)
    user_failure = failure.step_failure_data.user_failure_data
    assert user_failure is not None
    assert str(Store(tmp_path).base_model("tiny")) in (user_failure.description or "")
