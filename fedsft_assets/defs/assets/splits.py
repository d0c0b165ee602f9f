"""`processed/<dataset>` and `combined`: records in NeMo's SFT format, in three splits."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from fedsft_assets.data.combine import combine
from fedsft_assets.data.plots import percentiles, plot_lengths
from fedsft_assets.data.records import DataError, iterate_records, preview
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.data.splits import rejected_file, split_dataset
from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.metadata import image
from fedsft_assets.defs.resources import ModelResource, SplitsResource, StoreResource
from fedsft_assets.model.errors import ModelError
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.specs.model_preset import ModelPreset
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import adding


def processed_asset(dataset: DatasetSpec) -> dg.AssetsDefinition:
    @dg.asset(
        key_prefix="processed",
        name=dataset.name,
        group_name="processed",
        kinds={"jsonl"},
        ins={"raw": dg.AssetIn(["raw", dataset.name])},
        description=f"{dataset.label} as NeMo SFT records, split deterministically by content.",
    )
    def processed(
        raw: Path, store: StoreResource, splits: SplitsResource, model: ModelResource
    ) -> dg.MaterializeResult[Path]:
        versions = store.files.processed(dataset.name)
        with as_dagster_failure(DataError), adding(versions) as addition:
            report = split_dataset(dataset, raw, addition.folder, splits.settings, rejected=rejected_file(versions))
        return _result(report, addition.version, store.files, model.load())

    return processed


def combined_asset(datasets: Sequence[DatasetSpec]) -> dg.AssetsDefinition:
    @dg.asset(
        group_name="combined",
        kinds={"jsonl"},
        ins={f"processed_{dataset.name}": dg.AssetIn(["processed", dataset.name]) for dataset in datasets},
        description="The union of all datasets' splits, shuffled. Every job validates on its validation split.",
    )
    def combined(store: StoreResource, model: ModelResource, **processed: Path) -> dg.MaterializeResult[Path]:
        with as_dagster_failure(DataError), adding(store.files.combined) as addition:
            report = combine(list(processed.values()), into=addition.folder)
        return _result(report, addition.version, store.files, model.load())

    return combined


def _shown(report: SplitReport) -> str:
    """The first split with records."""
    return next(split for split, count in report.counts.items() if count)


def _result(report: SplitReport, folder: Path, files: Store, preset: ModelPreset) -> dg.MaterializeResult[Path]:
    from fedsft_assets.model.preset_tokenizer import preset_tokenizer
    from fedsft_assets.model.training.lengths import token_lengths

    with as_dagster_failure(ModelError, DataError):
        lengths = token_lengths(folder, preset_tokenizer(preset, files.tokenizers, files.downloads))
    chart = files.reports / "lengths" / f"{report.name}-{folder.name[:12]}-{preset.name}.png"
    plot_lengths(lengths, preset.max_length, f"{report.name} in tokens of {preset.name}", chart)
    return dg.MaterializeResult(
        value=folder,
        data_version=dg.DataVersion(report.digest),
        metadata={
            **report.as_metadata(),
            **{f"tokens, {name}": value for name, value in percentiles(lengths).items()},
            "token lengths": image(chart),
            "dagster/row_count": report.records,
            "path": dg.MetadataValue.path(folder),
            "preview": dg.MetadataValue.md(preview(iterate_records(split_file(folder, _shown(report))))),
        },
    )
