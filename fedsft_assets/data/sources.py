"""The datasets of the study, and how their raw files come from a source into the store.

A source is a folder of datasets laid out as published, or None: the embedded sample. A source is
read, never changed.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from fedsft_assets.data import alpaca, dolly, oasst1
from fedsft_assets.data.records import DataError, Example
from fedsft_assets.data.sample import write_sample
from fedsft_assets.data.tables import count_rows, require_file
from fedsft_assets.store import folder_digest, publish_folder


@dataclass(frozen=True)
class Dataset:
    """One dataset: where it is published, which files it has, and how they are read.

    `files` are relative to the dataset's folder, which a source calls `folder`.
    """

    name: str
    title: str
    repository: str
    folder: str
    files: tuple[str, ...]
    read: Callable[[Path], Iterator[Example]]


@dataclass(frozen=True)
class FetchReport:
    """What fetching a dataset brought: its digest, its number of files, their bytes and their rows."""

    digest: str
    files: int
    bytes: int
    rows: int

    def as_metadata(self) -> dict[str, str | int]:
        return asdict(self)


DATASETS: dict[str, Dataset] = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="alpaca",
            title="Stanford Alpaca",
            repository="tatsu-lab/alpaca",
            folder="alpaca",
            files=alpaca.FILES,
            read=alpaca.read,
        ),
        Dataset(
            name="dolly",
            title="Databricks Dolly 15k",
            repository="databricks/databricks-dolly-15k",
            folder="databricks-dolly-15k",
            files=dolly.FILES,
            read=dolly.read,
        ),
        Dataset(
            name="oasst1",
            title="OpenAssistant Conversations 1",
            repository="OpenAssistant/oasst1",
            folder="oasst1",
            files=oasst1.FILES,
            read=oasst1.read,
        ),
    )
}


def source_digest(dataset: Dataset, source: Path | None) -> str:
    """The digest that `fetch` would report, without fetching: cheap enough for a sensor to ask often.

    Raises DataError if a file is missing.
    """
    return _sample_digest(dataset.name) if source is None else _files_digest(dataset, _require(dataset, source))


def fetch(dataset: Dataset, source: Path | None, into: Path) -> FetchReport:
    """Copy the dataset's files from the source to `into`, whole or not at all.

    Only the files that the dataset names are taken. They are read through first, so that what
    cannot be used never replaces what can. Raises DataError that names the source's file.
    """
    if source is not None and not sum(1 for _ in dataset.read(_require(dataset, source))):
        raise DataError(f"{source / dataset.folder}: holds no example of {dataset.title}; take the files as published")
    with publish_folder(into) as fresh:
        if source is None:
            write_sample(dataset.name, fresh)
        else:
            for name in dataset.files:
                (fresh / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / dataset.folder / name, fresh / name)
        paths = [fresh / name for name in dataset.files]
        return FetchReport(
            digest=folder_digest(fresh),
            files=len(paths),
            bytes=sum(path.stat().st_size for path in paths),
            rows=sum(count_rows(path) for path in paths),
        )


def _require(dataset: Dataset, source: Path) -> Path:
    """The dataset's folder in the source, once all its files are there."""
    folder = source / dataset.folder
    if not folder.is_dir():
        found = ", ".join(sorted(path.name for path in source.glob("*"))) if source.is_dir() else "no such folder"
        raise DataError(
            f"{source}: has no folder {dataset.folder} for {dataset.title}, found {found or 'nothing'}; "
            f"put the files of {dataset.repository} there as published"
        )
    for name in dataset.files:
        require_file(folder / name)
    return folder


def _files_digest(dataset: Dataset, folder: Path) -> str:
    """The folder digest of just the dataset's files, whatever lies beside them in the source."""
    with TemporaryDirectory(prefix="fedsft-digest-") as name:
        links = Path(name)
        for file in dataset.files:
            (links / file).parent.mkdir(parents=True, exist_ok=True)
            (links / file).symlink_to((folder / file).resolve())
        return folder_digest(links)


@cache
def _sample_digest(dataset_name: str) -> str:
    with TemporaryDirectory(prefix="fedsft-sample-") as folder:
        write_sample(dataset_name, Path(folder))
        return folder_digest(Path(folder))
