"""`raw/<dataset>`: the files of a dataset as their publisher laid them out."""

from pathlib import Path

import dagster as dg

from fedsft_assets.data.formats.readers import read_examples
from fedsft_assets.data.records import DataError, preview
from fedsft_assets.data.sources.fetch import fetch
from fedsft_assets.data.splits import first_records
from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.resources import SourceResource, SplitsResource, StoreResource
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.versions import adding

SOURCE_VERSION = "source version"


def raw_asset(dataset: DatasetSpec) -> dg.AssetsDefinition:
    @dg.asset(
        key_prefix="raw",
        name=dataset.name,
        group_name="raw",
        kinds={Path(dataset.file_names[0]).suffix.removeprefix(".")},
        description=f"{dataset.label} as it is in {dataset.hub or dataset.path}.",
    )
    def raw(store: StoreResource, source: SourceResource, splits: SplitsResource) -> dg.MaterializeResult[Path]:
        with as_dagster_failure(DataError), adding(store.files.raw(dataset.name)) as addition:
            report = fetch(dataset, source.place, addition.folder, store.files.downloads)
        folder = addition.version
        records = first_records(read_examples(dataset, folder), splits.settings)
        return dg.MaterializeResult(
            value=folder,
            data_version=dg.DataVersion(report.digest),
            metadata={
                SOURCE_VERSION: report.version,
                "files": report.files,
                "bytes": report.bytes,
                "dagster/row_count": report.rows,
                "path": dg.MetadataValue.path(folder),
                "preview": dg.MetadataValue.md(preview(records)),
            },
        )

    return raw
