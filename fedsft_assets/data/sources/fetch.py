"""Copying of a dataset's raw files from their source into the store.

A source is `sample` (embedded), `hub` (as published), or a folder laid out like the published
repositories. Sources are never modified.
"""

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fedsft_assets.data.formats.examples import Rejected
from fedsft_assets.data.formats.parquet import open_parquet
from fedsft_assets.data.formats.readers import read_examples
from fedsft_assets.data.records import DataError
from fedsft_assets.data.sources import hub
from fedsft_assets.data.sources.sample import SAMPLED, write_sample
from fedsft_assets.files import folder_digest, publish_folder
from fedsft_assets.specs.dataset import HUB, SAMPLE, DatasetSpec


@dataclass(frozen=True)
class FetchReport:
    """What was fetched: number of files, size in bytes, and number of rows.

    `version` identifies the content at its source, as in `source_version`; `digest` is of the files.
    """

    version: str
    digest: str
    files: int
    bytes: int
    rows: int


def source_version(dataset: DatasetSpec, source: str) -> str:
    """Identify the content that `fetch` would get, without fetching it: cheap enough for a sensor to poll.

    It is the digest of the files, or the repository and its commit. Raises DataError if a file is missing,
    or if the hub does not answer which commit a branch points to.
    """
    folder = _folder(dataset, source)
    if folder is not None:
        return folder_digest(folder, dataset.file_names)
    if is_sampled(dataset, source):
        return _sample_digest(dataset.name)
    assert dataset.hub is not None, "DatasetSpec ensures it"
    return _hub_version(dataset.hub, hub.resolve(dataset.hub, dataset.revision))


def fetch(dataset: DatasetSpec, source: str, into: Path, downloads: Path) -> FetchReport:
    """Copy the dataset's files from the source to `into`, atomically.

    Only the files that the dataset names are copied. They are read in full first, so that unusable files
    never replace usable ones. Hub files are also kept in `downloads`, where an interrupted download
    resumes. Raises DataError naming the source's file.
    """
    folder, version = _folder(dataset, source), None
    if folder is None and not is_sampled(dataset, source):
        folder, version = _download(dataset, downloads)
    with publish_folder(into) as fresh:
        if folder is None:
            write_sample(dataset.name, fresh)
            rows = _count_rows(dataset, fresh)
        else:
            rows = _count_rows(dataset, folder)
            for name in dataset.file_names:
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, fresh / name)
        digest = folder_digest(fresh)
        size = sum((fresh / name).stat().st_size for name in dataset.file_names)
    return FetchReport(version or digest, digest, files=len(dataset.file_names), bytes=size, rows=rows)


def _folder(dataset: DatasetSpec, source: str) -> Path | None:
    """The folder that has the dataset's files; None if they come from the sample or the hub."""
    if dataset.path:
        folder = dataset.path if dataset.files else dataset.path.parent
        advice = f"correct path or files in datasets/{dataset.name}.yaml"
    elif source in (SAMPLE, HUB):
        return None
    else:
        folder = Path(source) / dataset.folder
        advice = f"put the files of {dataset.hub} there as published"
    if not folder.is_dir():
        beside = sorted(path.name for path in folder.parent.glob("*"))
        found = ", ".join(beside) if folder.parent.is_dir() else "no such folder"
        raise DataError(
            f"{folder.parent}: has no folder {folder.name} for {dataset.label}, found {found or 'nothing'}; {advice}"
        )
    for name in dataset.file_names:
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: is missing; {advice}")
    return folder


def is_sampled(dataset: DatasetSpec, source: str) -> bool:
    """Whether the dataset is read from the embedded sample."""
    return source == SAMPLE and dataset.hub is not None and dataset.name in SAMPLED


def _download(dataset: DatasetSpec, downloads: Path) -> tuple[Path, str]:
    """Download the dataset's files from the hub; return their folder and version."""
    assert dataset.hub is not None, "DatasetSpec ensures it"
    area = downloads / f"datasets--{dataset.hub.replace('/', '--')}"
    served = hub.download(dataset.hub, dataset.revision, dataset.file_names, area)
    depth = len(Path(dataset.file_names[0]).parts)
    return served.paths[0].parents[depth - 1], _hub_version(dataset.hub, served.commit)


def _hub_version(repository: str, commit: str) -> str:
    return f"{repository}@{commit}"


def _count_rows(dataset: DatasetSpec, folder: Path) -> int:
    """Read all files and return their number of rows. Raises DataError if none is usable."""
    rows = usable = 0
    first: Rejected | None = None
    for examples in read_examples(dataset, folder):
        usable += len(examples.rows)
        rows += len(examples.rows) + len(examples.rejected)
        first = first or next(iter(examples.rejected), None)
    if not usable:
        why = f" ({first.file} row {first.row}: {first.reason}: {first.found})" if first else ""
        raise DataError(
            f"{folder}: no usable row of {dataset.label} in {', '.join(dataset.file_names)}{why}; "
            "use the files as published, or set columns to match them"
        )
    if dataset.format == "oasst1":  # each row is a message, and only some of them are examples
        return sum(open_parquet(folder / name, {}).metadata.num_rows for name in dataset.file_names)
    return rows


@cache
def _sample_digest(dataset_name: str) -> str:
    with TemporaryDirectory(prefix="fedsft-sample-") as folder:
        write_sample(dataset_name, Path(folder))
        return folder_digest(Path(folder))
