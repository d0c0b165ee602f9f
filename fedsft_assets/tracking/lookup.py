"""Finds registered versions and the folders of their models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fedsft_assets.credentials import as_given, redacted
from fedsft_assets.files import own_folder, remove_left
from fedsft_assets.tracking.mlflow_store import CHAMPION, Tracking
from fedsft_assets.tracking.registry import local_folder, versions_of

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

_FILE = "MLmodel"


class NoModelError(LookupError):
    """There is no such version, or it cannot be loaded; the message says what to do."""


def find_version(tracking: Tracking, model: str, job: str | None = None) -> ModelVersion:
    """The newest version of `model` that `job` has made; without `job`, the champion. Raises NoModelError."""
    from mlflow.exceptions import MlflowException

    client = tracking.client()
    if job:
        versions = list(versions_of(client, model))
        own = [version for version in versions if version.tags.get("job") == job]
        if not own:
            jobs = sorted({version.tags["job"] for version in versions if "job" in version.tags})
            has = f"it has versions of {', '.join(jobs)}" if jobs else "it has none; run 'fedsft study' first"
            raise NoModelError(f"{model} in {tracking.uri}: no version of job {job!r}; {has}")
        return max(own, key=lambda version: int(version.version))
    try:
        return client.get_model_version_by_alias(model, CHAMPION)
    except MlflowException as error:
        if 400 <= error.get_http_status_code() < 500:
            raise NoModelError(
                f"{model} in {tracking.uri}: has no version with the alias {CHAMPION!r}; `comparison` sets it for a"
                " model that is better than the base model. Name a job to serve its newest version"
            ) from None
        raise


@contextmanager
def model_folder(tracking: Tracking, version: ModelVersion, downloads: Path) -> Iterator[Path]:
    """The folder of the version's model: its own on this machine, else a copy beside `downloads`, removed at the end.

    Raises NoModelError if an earlier version of this package has registered it, as a path only.
    """
    source = version.source or ""
    own = local_folder(source)
    if own and (own / _FILE).is_file():
        yield own
        return
    if own or source.startswith("runs:"):
        raise NoModelError(
            f"{version.name} version {version.version}: was registered by an earlier version of fedsft, as the path of"
            f" an archive; ask it with fedsft-generate --checkpoint {version.tags.get('archive', source)}, or train"
            " the job again"
        )
    from mlflow.artifacts import download_artifacts

    downloads.parent.mkdir(parents=True, exist_ok=True)
    remove_left(downloads)
    with own_folder(downloads) as folder, redacted():
        target = folder / "model"
        target.mkdir()
        download_artifacts(source, dst_path=str(target), tracking_uri=as_given(tracking.uri))
        yield next(target.rglob(_FILE)).parent
