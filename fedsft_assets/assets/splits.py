"""`processed/<dataset>` and `combined`: records in NeMo's SFT format, in three splits."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from fedsft_assets.data.records import preview, read_records
from fedsft_assets.data.sources import Dataset
from fedsft_assets.data.splits import DEFAULT_SEED, SplitReport, combine, split_dataset
from fedsft_assets.resources import StoreResource
from fedsft_assets.store import split_file


class SplitConfig(dg.Config):
    """The seed decides which record falls into which split; use one seed for all datasets of a study."""

    seed: int = DEFAULT_SEED


def processed_asset(dataset: Dataset) -> dg.AssetsDefinition:
    @dg.asset(
        key_prefix="processed",
        name=dataset.name,
        group_name="processed",
        kinds={"jsonl"},
        deps=[dg.AssetKey(["raw", dataset.name])],
        description=f"{dataset.title} as NeMo SFT records, split once and for all by content.",
    )
    def processed(config: SplitConfig, store: StoreResource) -> dg.MaterializeResult:
        folder = store.files.processed(dataset.name)
        report = split_dataset(dataset, raw=store.files.raw(dataset.name), into=folder, seed=config.seed)
        return _result(folder, report)

    return processed


def combined_asset(datasets: Sequence[Dataset]) -> dg.AssetsDefinition:
    @dg.asset(
        group_name="combined",
        kinds={"jsonl"},
        deps=[dg.AssetKey(["processed", dataset.name]) for dataset in datasets],
        description="The union of all datasets' splits, shuffled. Every job validates on its validation split.",
    )
    def combined(config: SplitConfig, store: StoreResource) -> dg.MaterializeResult:
        folder = store.files.combined
        sources = [store.files.processed(dataset.name) for dataset in datasets]
        return _result(folder, combine(sources, into=folder, seed=config.seed))

    return combined


def _result(folder: Path, report: SplitReport) -> dg.MaterializeResult:
    return dg.MaterializeResult(
        data_version=dg.DataVersion(report.digest),
        metadata={
            **report.as_metadata(),
            "dagster/row_count": report.records,
            "path": dg.MetadataValue.path(folder),
            "preview": dg.MetadataValue.md(preview(read_records(split_file(folder, "training")))),
        },
    )
