"""The asset check `opens_in_nemo`, through Dagster: what NeMo makes of each checkpoint, and of one that is damaged."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import torch

from fedsft_assets.defs.nemo_checks import CHECK, nemo_checks
from fedsft_assets.defs.resources import resources
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.model import nemo_agreement
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.settings import Settings
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import Store
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import made_current

JOBS = [
    JobSpec(name=name, description="a job", sites={"site-1": SiteSpec(dataset="combined")}, rounds=1)
    for name in ("damaged", "good", "other")
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A home with three checkpoints, of which one is cut off."""
    torch.set_num_threads(1)
    store = Store(tmp_path_factory.mktemp("home"))
    for seed, job in enumerate(JOBS):
        with made_current(store.checkpoint(job.name)) as folder:
            create_base_model(PRESETS["tiny"], folder / MODEL_FILE, seed, ["What is it? It is so. Why?"])
            if job.name == "damaged":
                content = (folder / MODEL_FILE).read_bytes()
                (folder / MODEL_FILE).write_bytes(content[: len(content) // 2])
    return store


@pytest.fixture
def check(store: Store) -> Callable[..., dict[str, dg.AssetCheckEvaluation]]:
    """Execute the checks of some jobs, of all if none is named, over a home; gives what each found."""

    def run(*jobs: str, home: Path = store.home) -> dict[str, dg.AssetCheckEvaluation]:
        return _execute(home, jobs or [job.name for job in JOBS])

    return run


def _execute(home: Path, jobs: Sequence[str], run_id: str | None = None) -> dict[str, dg.AssetCheckEvaluation]:
    keys = [dg.AssetCheckKey(dg.AssetKey(["checkpoint", name]), CHECK) for name in jobs]
    definitions = dg.Definitions(
        assets=[dg.AssetSpec(["checkpoint", job.name]) for job in JOBS],
        asset_checks=[nemo_checks(JOBS)],
        jobs=[dg.define_asset_job("check", dg.AssetSelection.checks(*keys))],
        resources=resources(Settings(home=home)),
    )
    result = definitions.resolve_job_def("check").execute_in_process(run_id=run_id)
    assert result.success
    return {found.asset_key.path[-1]: found for found in result.get_asset_check_evaluations()}


def _values(found: dg.AssetCheckEvaluation) -> dict[str, Any]:
    return {name: value.value for name, value in found.metadata.items()}


def test_damaged_checkpoint_fails_and_the_others_have_their_result(
    store: Store, check: Callable[..., dict[str, dg.AssetCheckEvaluation]]
) -> None:
    found = check()
    assert {name: (one.passed, one.severity, one.blocking) for name, one in found.items()} == {
        "damaged": (False, dg.AssetCheckSeverity.ERROR, False),
        "good": (True, dg.AssetCheckSeverity.ERROR, False),
        "other": (True, dg.AssetCheckSeverity.ERROR, False),
    }
    damaged = current(store.checkpoint("damaged")) / MODEL_FILE
    assert str(damaged) in (found["damaged"].description or "")
    assert "truncated" in (found["damaged"].description or "")
    values = _values(found["good"])
    assert values["path"] == str(current(store.checkpoint("good")) / MODEL_FILE)
    assert (values["largest difference"], values["prompts"]) == (0.0, len(nemo_agreement.PROMPTS))
    assert values["largest logit"] > 0
    assert _values(found["other"])["largest logit"] != values["largest logit"]


def test_checkpoints_can_be_checked_alone(check: Callable[..., dict[str, dg.AssetCheckEvaluation]]) -> None:
    assert {name: one.passed for name, one in check("good").items()} == {"good": True}


def test_what_a_run_has_made_is_checked_though_another_version_has_become_current(tmp_path: Path, store: Store) -> None:
    home, made = Store(tmp_path), []
    for job in ("good", "other"):
        with made_current(home.checkpoint("good")) as folder:
            (folder / MODEL_FILE).write_bytes((current(store.checkpoint(job)) / MODEL_FILE).read_bytes())
        made.append(current(home.checkpoint("good")))
    record = home.made / "11111111-1111-4111-8111-111111111111" / "checkpoint__good.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"version": str(made[0].relative_to(tmp_path))}))
    paths = [
        _values(_execute(tmp_path, ["good"], run_id)["good"])["path"]
        for run_id in (record.parent.name, "22222222-2222-4222-8222-222222222222")
    ]
    assert paths == [str(version / MODEL_FILE) for version in made]


def test_checkpoint_that_is_not_there_fails_with_what_to_do(
    check: Callable[..., dict[str, dg.AssetCheckEvaluation]], tmp_path: Path
) -> None:
    found = check("good", home=tmp_path)["good"]
    assert not found.passed
    assert str(Store(tmp_path).checkpoint("good")) in (found.description or "")


def test_model_that_is_another_one_to_nemo_fails_with_the_difference(
    check: Callable[..., dict[str, dg.AssetCheckEvaluation]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An archive is read by two readers: here the project's own reads one weight wrongly."""
    load = LanguageModel.load.__func__  # type: ignore[attr-defined]

    def load_wrongly(cls: type[LanguageModel], path: Path) -> LanguageModel:
        model: LanguageModel = load(cls, path)
        with torch.no_grad():
            model.lm.get_output_embeddings().weight[:, 0] += 1e-3
        return model

    monkeypatch.setattr(LanguageModel, "load", classmethod(load_wrongly))
    found = check("good")["good"]
    assert not found.passed
    assert 1e-5 < _values(found)["largest difference"] < 1
    assert "the largest difference of a logit is" in (found.description or "")


def test_weights_that_are_no_numbers_fail(
    check: Callable[..., dict[str, dg.AssetCheckEvaluation]], tmp_path: Path, store: Store
) -> None:
    model = LanguageModel.load(current(store.checkpoint("good")) / MODEL_FILE)
    with torch.no_grad():
        model.lm.get_output_embeddings().weight[0, 0] = float("nan")
    with made_current(Store(tmp_path).checkpoint("good")) as folder:
        model.save(folder / MODEL_FILE)
    found = check("good", home=tmp_path)["good"]
    assert not found.passed
    assert "not finite" in (found.description or "")
