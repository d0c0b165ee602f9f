"""The ratio of noise to updates, and the error before training about too much of it."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.federation.noise_ratio import NoiseRatio, noise_ratio
from fedsft_assets.federation.site.update_filters import ChangeFilter
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.lora import add_adapters
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.job import FiltersSpec, JobSpec, PeftSpec, PrivacySpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.store import Store
from fedsft_assets.versions import NoVersionError, current
from fedsft_assets_tests.prepared import made_current, small_splits
from fedsft_assets_tests.shipped import DATASETS

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny.nemo"
    create_base_model(TINY, path, 7, ["a text", "and another one"])
    return path


def _spec(noise_multiplier: float, **others: Any) -> JobSpec:
    spec = JobSpec.load(PROJECT / "jobs" / "fedavg.yaml", list(DATASETS))
    privacy = PrivacySpec(clip=1.0, noise_multiplier=noise_multiplier)
    return spec.model_copy(update={"rounds": 24, "filters": FiltersSpec(privacy=privacy), **others})


def test_expected_norm_of_noise_is_that_of_real_noise() -> None:
    """Of the mean of four sites, and of the sum of nine rounds, over a change that is clipped."""
    privacy = PrivacySpec(clip=0.5, noise_multiplier=0.02)
    ratio = NoiseRatio(privacy, parameters=40_000, sites=4, rounds=9)
    chosen = ChangeFilter(FiltersSpec(privacy=privacy))
    sent = torch.stack([chosen.privatized({"w": torch.zeros(40_000)})["w"] for _ in range(36)])
    assert sent[0].norm().item() / 0.5 == pytest.approx(ratio.of_site, rel=0.05)
    assert sent[:4].mean(0).norm().item() / 0.5 == pytest.approx(ratio.of_round, rel=0.05)
    assert sent.view(9, 4, -1).mean(1).sum(0).norm().item() / 9 / 0.5 == pytest.approx(ratio.of_job, rel=0.05)


def test_parameters_that_a_site_sends_are_counted(archive: Path) -> None:
    model = LanguageModel.load(archive)
    whole = {name: tensor.numel() for name, tensor in model.distinct_parameters().items()}
    assert noise_ratio(_spec(1.0), archive).parameters == sum(whole.values())  # type: ignore[union-attr]
    without = _spec(1.0)
    filters = without.filters.model_copy(update={"exclude": ["wte", r"bias$"]})
    left = sum(count for name, count in whole.items() if "wte" not in name and not name.endswith("bias"))
    assert noise_ratio(without.model_copy(update={"filters": filters}), archive).parameters == left  # type: ignore[union-attr]
    peft = PeftSpec(rank=4)
    adapters = _spec(1.0, training=without.training.model_copy(update={"peft": peft}))
    add_adapters(model, peft, seed=1)
    trained = sum(map(torch.numel, model.distinct_parameters().values()))
    assert noise_ratio(adapters, archive).parameters == trained  # type: ignore[union-attr]


def test_job_without_noise_has_no_ratio_and_needs_no_model() -> None:
    assert noise_ratio(_spec(1.0, filters=FiltersSpec()), Path("nowhere")) is None


@pytest.mark.parametrize("noise_multiplier", [0.08, 1.0, 1e9])
def test_noise_under_which_nothing_can_be_learned_is_an_error_that_says_what_to_do(noise_multiplier: float) -> None:
    ratio = NoiseRatio(PrivacySpec(clip=3.0, noise_multiplier=noise_multiplier), 1_000_000, sites=4, rounds=9)
    with pytest.raises(SpecError) as told:
        ratio.require_less("fedavg")
    said = str(told.value)
    assert said.startswith(f"jobs/fedavg.yaml: filters.privacy.noise_multiplier: {noise_multiplier:g}: nothing can be")
    assert f"On 1,000,000 parameters it has {1000 * noise_multiplier:,.3g} times the norm of a site's clipped" in said
    assert f"{500 * noise_multiplier:,.3g} times in the mean of 4 sites" in said
    assert f"{500 / 3 * noise_multiplier:,.3g} times over all 9 rounds at best; expected at most 10 times" in said
    assert "training.peft, filters.exclude), or use more sites or rounds" in said
    advised = float(re.search(r"Lower it to (\S+),", said).group(1))  # type: ignore[union-attr]
    assert advised == pytest.approx(10 * 3 / 500, rel=0.05)
    assert "learning rate" not in said


def test_noise_that_many_sites_and_rounds_drown_is_let_through() -> None:
    privacy = PrivacySpec(clip=1.0, noise_multiplier=1.0)
    NoiseRatio(privacy, parameters=1_000_000, sites=1000, rounds=100).require_less("fedavg")
    with pytest.raises(SpecError, match=r"317 times in the one round at best"):
        NoiseRatio(privacy, parameters=100_489, sites=1, rounds=1).require_less("fedavg")
    accepted = privacy.model_copy(update={"accept_useless_noise": True})
    NoiseRatio(accepted, parameters=1_000_000, sites=1, rounds=1).require_less("fedavg")


@pytest.fixture
def store(tmp_path: Path, archive: Path) -> Store:
    store = small_splits(tmp_path / "home")
    with made_current(store.base_model("tiny")) as base_model:
        (base_model / "tiny.nemo").write_bytes(archive.read_bytes())
    return store


def test_job_folder_with_useless_noise_is_not_built(store: Store) -> None:
    with pytest.raises(SpecError, match=r"noise_multiplier: 1: nothing can be learned under this much noise"):
        build_job_folder(_spec(1.0), TINY, store)
    with pytest.raises(NoVersionError):
        current(store.job_folder("fedavg"))


@pytest.mark.parametrize("accepted", [False, True])
def test_server_is_told_how_large_the_noise_is(store: Store, accepted: bool) -> None:
    spec = _spec(1.0 if accepted else 1e-3)
    privacy = spec.filters.privacy.model_copy(update={"accept_useless_noise": accepted})  # type: ignore[union-attr]
    report = build_job_folder(spec.model_copy(update={"filters": FiltersSpec(privacy=privacy)}), TINY, store)
    assert report.noise is not None
    config = json.loads((report.folder / "app_server/config/config_fed_server.json").read_text())
    told = config["workflows"][0]["args"]["noise_ratio"]
    assert told == report.noise.of_round == privacy.noise_multiplier * math.sqrt(report.noise.parameters / 3)
