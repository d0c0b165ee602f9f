"""A tiny base model, records that it can learn, and plans to train it by."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedsft_assets.model.base_model import BaseModelReport, create_base_model
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens, tokenize
from fedsft_assets.specs.job import TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.plan import SitePlan

SEED = 7
_COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sea": "blue", "gold": "yellow"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def records() -> list[dict[str, str]]:
    """Questions of several lengths, each with one answer."""
    return [
        {"input": f"{opening}what is the colour of {thing}?", "output": f"{thing} is {colour}."[: None if long else -1]}
        for opening, long in (("", True), ("Tell me now, since I would really like to know: ", False), ("Say ", True))
        for thing, colour in _COLOURS.items()
    ]


@pytest.fixture(scope="session")
def texts(records: list[dict[str, str]]) -> list[str]:
    return [f"{record['input']}\n\nAnswer: {record['output']}" for record in records]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Path, BaseModelReport]:
    path = tmp_path_factory.mktemp("base") / "tiny.nemo"
    return path, create_base_model(PRESETS["tiny"], path, SEED, texts)


@pytest.fixture
def model(base: tuple[Path, BaseModelReport]) -> LanguageModel:
    return LanguageModel.load(base[0])


@pytest.fixture
def tokens(model: LanguageModel, records: list[dict[str, str]]) -> list[Tokens]:
    return tokenize(records, model.tokenizer, model.max_length)


@pytest.fixture(scope="session")
def make_plan(base: tuple[Path, BaseModelReport]) -> Callable[..., SitePlan]:
    def make(site: str = "site-1", rounds: int = 2, local_epochs: int = 1, **changes: object) -> SitePlan:
        given = {"batch_size": 4, "learning_rate": 3e-3, **changes}
        steps = given.pop("max_local_steps", None)
        return SitePlan(
            job="fedavg",
            site=site,
            rounds=rounds,
            local_epochs=local_epochs,
            max_local_steps=steps,
            max_evaluation_records=None,
            seed=1,
            training=PRESETS["tiny"].resolve(TrainingSpec.model_validate(given)),
            base_model=base[0],
            training_file=Path("training.jsonl"),
            validation_file=Path("validation.jsonl"),
            digests={},
        )

    return make
