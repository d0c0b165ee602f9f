"""`raw/<dataset>`: the files of a dataset as their publisher laid them out."""

import dagster as dg

from fedsft_assets.data.records import preview
from fedsft_assets.data.sources import Dataset, fetch
from fedsft_assets.data.splits import DEFAULT_SEED, to_record
from fedsft_assets.resources import SourceResource, StoreResource


def raw_asset(dataset: Dataset) -> dg.AssetsDefinition:
    kind = "parquet" if dataset.files[0].endswith(".parquet") else "jsonl"

    @dg.asset(
        key_prefix="raw",
        name=dataset.name,
        group_name="raw",
        kinds={kind},
        description=f"{dataset.title} as published in {dataset.repository}, or its part of the embedded sample.",
    )
    def raw(store: StoreResource, source: SourceResource) -> dg.MaterializeResult:
        folder = store.files.raw(dataset.name)
        report = fetch(dataset, source.folder, into=folder)
        records = (to_record(example, DEFAULT_SEED) for example in dataset.read(folder))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(report.digest),
            metadata={
                **report.as_metadata(),
                "dagster/row_count": report.rows,
                "path": dg.MetadataValue.path(folder),
                "preview": dg.MetadataValue.md(preview(records)),
            },
        )

    return raw
