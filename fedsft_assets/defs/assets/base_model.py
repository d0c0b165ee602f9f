"""`base_model`: the checkpoint that all jobs start from."""

from pathlib import Path

import dagster as dg

from fedsft_assets.data.sources.hub import HubError
from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.resources import ModelResource, StoreResource
from fedsft_assets.model.errors import ModelError
from fedsft_assets.specs.job import DEFAULT_SEED
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.store import Store, archive_file
from fedsft_assets.versions import adding


class BaseModelConfig(dg.Config):
    """The seed of random weights, for presets without pretrained ones."""

    seed: int = DEFAULT_SEED  # a partition's own seed comes first


def base_model_asset(seeds: dg.PartitionsDefinition | None = None) -> dg.AssetsDefinition:
    """`seeds` are partitions for a model with random weights."""

    @dg.asset(
        group_name="model",
        kinds={"nemo", "pytorch"},
        partitions_def=seeds,
        description="The checkpoint that all jobs start from, as a NeMo archive with its tokenizer inside.",
    )
    def base_model(
        context: dg.AssetExecutionContext, config: BaseModelConfig, store: StoreResource, model: ModelResource
    ) -> dg.MaterializeResult[Path]:
        seed = int(context.partition_key) if context.has_partition_key else config.seed
        return _created(store.of_run(context.run), model, seed)

    return base_model


def _created(files: Store, model: ModelResource, seed: int) -> dg.MaterializeResult[Path]:
    from fedsft_assets.model.base_model import create_base_model

    with as_dagster_failure(ModelError, SpecError, HubError):
        preset = model.load()
        with adding(files.base_model(preset.name)) as addition:
            archive = addition.folder / f"{preset.name}.nemo"
            report = create_base_model(preset, archive, seed, downloads=files.downloads)
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
