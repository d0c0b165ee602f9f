"""`base_model`: the checkpoint that all jobs start from."""

from pathlib import Path

import dagster as dg

from fedsft_assets.data.sources.hub import HubError
from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.resources import ModelResource, StoreResource
from fedsft_assets.model.errors import ModelError
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.store import archive_file
from fedsft_assets.versions import adding


class BaseModelConfig(dg.Config):
    """The seed of random weights, for presets without pretrained ones."""

    seed: int = 1234


@dg.asset(
    group_name="model",
    kinds={"nemo", "pytorch"},
    description="The checkpoint that all jobs start from, as a NeMo archive with its tokenizer inside.",
)
def base_model(config: BaseModelConfig, store: StoreResource, model: ModelResource) -> dg.MaterializeResult[Path]:
    from fedsft_assets.model.base_model import create_base_model

    with as_dagster_failure(ModelError, SpecError, HubError):
        preset = model.load()
        with adding(store.files.base_model(preset.name)) as addition:
            archive = addition.folder / f"{preset.name}.nemo"
            report = create_base_model(preset, archive, config.seed, downloads=store.files.downloads)
        archive = archive_file(addition.version)
    return dg.MaterializeResult(
        value=addition.version,
        data_version=dg.DataVersion(report.digest),
        metadata={
            "preset": preset.name,
            "title": report.title,
            "parameters": report.parameters,
            "vocabulary": report.vocabulary,
            "layers": report.layers,
            "width": report.width,
            "bytes": archive.stat().st_size,
            "path": dg.MetadataValue.path(archive),
        },
    )
