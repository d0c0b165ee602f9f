"""The asset `base_model`: what it makes of a model on this machine, and how it says what is wrong with it."""

from pathlib import Path

import dagster as dg
import pytest

from fedsft_assets.defs.assets.base_model import base_model_asset
from fedsft_assets.defs.resources import resources
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.megatron.layout import LEGACY
from fedsft_assets.settings import Settings
from fedsft_assets_tests.model.megatron_archives import SETTINGS, SHAPE, VOCABULARY, members, random_tensors, write_tar


def _materialize(tmp_path: Path, model: Path | str, model_path: Path | None = None) -> dg.ExecuteInProcessResult:
    settings = Settings(home=tmp_path / "home", model=str(model), model_path=model_path)
    return dg.materialize([base_model_asset()], resources=resources(settings), raise_on_error=False)


def test_a_megatron_archive_becomes_the_base_model_of_a_study(tmp_path: Path) -> None:
    source = write_tar(tmp_path / "gpt.nemo", members(SETTINGS, random_tensors(LEGACY)))
    result = _materialize(tmp_path, source)
    assert result.success
    archive = (tmp_path / "home/base_models/gpt/current").resolve() / "gpt.nemo"
    (event,) = result.asset_materializations_for_node("base_model")
    found = {name: event.metadata[name].value for name in ("preset", "parameters", "vocabulary", "layers", "width")}
    assert found == {
        "preset": "gpt",
        "parameters": SHAPE.parameters,
        "vocabulary": len(VOCABULARY),
        "layers": SHAPE.layers,
        "width": SHAPE.hidden,
    }
    assert event.metadata["path"].value == str(archive)
    assert event.tags is not None
    assert event.tags["dagster/data_version"] == content_digest(archive)


@pytest.mark.parametrize(
    ("model", "path", "said"),
    [
        ("gpt.nemo", None, r"gpt.nemo: model_config.yaml: activation: 'swiglu' is not supported by GPT-2"),
        ("gpt-1.3b", "gpt.nemo", "num_layers: 3 is not the 24 of the preset"),
        ("gpt-1.3b", "nowhere", "FEDSFT_MODEL_PATH: "),
        ("nowhere", None, "FEDSFT_MODEL: "),
    ],
)
def test_a_model_that_cannot_be_used_fails_the_asset_with_what_is_wrong(
    tmp_path: Path, model: str, path: str | None, said: str
) -> None:
    settings = {**SETTINGS, "activation": "swiglu"}
    write_tar(tmp_path / "gpt.nemo", members(settings, random_tensors(LEGACY)))
    place = tmp_path / model if model == "gpt.nemo" else model
    result = _materialize(tmp_path, place, tmp_path / path if path else None)
    assert not result.success
    failure = result.failure_data_for_node("base_model")
    assert failure is not None
    assert failure.error is not None
    assert said in failure.error.message
    assert "Failure" in failure.error.message
    assert not list(tmp_path.glob("home/base_models/*"))
