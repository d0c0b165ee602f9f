"""Registers a checkpoint in MLflow as a version that loads: a logged model with the archive, and a version of it.

All steps can be repeated after any failure: what an earlier attempt has made is found by the execution's tag.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from fedsft_assets.files import link_or_copy, publish_folder
from fedsft_assets.tracking.model_folder import write_model_folder, write_reference
from fedsft_assets.tracking.model_loader import ARCHIVE
from fedsft_assets.tracking.record import Ending, Registration, TrackedExecution

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

EXECUTION_TAG = "fedsft.execution"
_GB = 1e9

Once = Callable[[str, Callable[[], object]], None]

_log = logging.getLogger(__name__)


class ModelRegistry:
    """Registers the checkpoint of one execution, whose MLflow run is `run_id`.

    An archive of more than `largest_upload` GB is not uploaded to a server: its model refers to it.
    """

    def __init__(
        self,
        client: MlflowClient,
        experiment: str,
        execution: TrackedExecution,
        run_id: str,
        ending: Ending,
        what: Registration,
        largest_upload: float,
    ) -> None:
        self._client = client
        self._experiment = experiment
        self._execution = execution
        self._run_id = run_id
        self._ending = ending
        self._what = what
        self._largest_upload = largest_upload

    def logged_model(self) -> LoggedModel:
        """The execution's logged model; created if it does not exist, without files."""
        if found := self._logged_models():
            return found[0]
        execution = self._execution
        return self._client.create_logged_model(
            self._experiment,
            name=execution.job,
            source_run_id=self._run_id,
            tags={"job": execution.job, "digest": self._what.digest, EXECUTION_TAG: execution.id},
            params=execution.params,
            model_type="fedsft",
        )

    def publish(self, model: LoggedModel, once: Once) -> None:
        """Give the model its files, each `once`, and make it ready to load."""
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        if model.status != LoggedModelStatus.READY:
            if folder := local_folder(model.artifact_location):
                once(f"folder of {model.model_id}", partial(self._make_folder, model.model_id, folder))
            else:
                self._upload(model.model_id, once)
            once(
                f"{model.model_id} is ready",
                lambda: self._client.finalize_logged_model(model.model_id, LoggedModelStatus.READY),
            )
        outputs = self._client.get_run(self._run_id).outputs
        if model.model_id not in {output.model_id for output in (outputs.model_outputs if outputs else [])}:
            self._client.log_outputs(self._run_id, [LoggedModelOutput(model.model_id, step=0)])

    def version(self, model: LoggedModel) -> str:
        """The model's version; created if it does not exist."""
        from mlflow.exceptions import MlflowException

        what, client = self._what, self._client
        try:
            client.create_registered_model(
                what.model, description="Checkpoints of all jobs that start from one base model."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        own = sorted((v for v in versions_of(client, what.model) if self._is_own(v.tags)), key=lambda v: int(v.version))
        if not own:
            tags = {
                "job": self._execution.job,
                "test_loss": repr(what.test_loss),
                "data": what.data,
                "digest": what.digest,
                "archive": what.archive,
                EXECUTION_TAG: self._execution.id,
            }
            # Not `models:/<id>`: a local store would look for the model in the tracking store of the process's default.
            created = client.create_model_version(
                *(what.model, model.artifact_location, self._run_id, tags),
                description=self._execution.note,
                await_creation_for=0,
                model_id=model.model_id,
            )
            own = [created]
        for extra in own[1:]:  # created by a request that timed out
            client.delete_model_version(what.model, extra.version)
        return str(own[0].version)

    def remove_strays(self, kept: str) -> None:
        """Delete logged models of this execution other than `kept`, created by requests that timed out."""
        for model in self._logged_models():
            if model.model_id != kept:
                self._client.delete_logged_model(model.model_id)

    def _logged_models(self) -> list[LoggedModel]:
        """Those of this execution, oldest first."""
        found = self._client.search_logged_models(
            [self._experiment],
            f"tags.`{EXECUTION_TAG}` = '{self._execution.id}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": True}],
        )
        return [model for model in found if self._is_own(model.tags)]

    def _is_own(self, tags: dict[str, str]) -> bool:
        return tags.get(EXECUTION_TAG) == self._execution.id and tags.get("digest") == self._what.digest

    def _write(self, model_id: str, folder: Path, contains_archive: bool) -> None:
        write_model_folder(folder, model_id, self._execution, self._run_id, self._ending, self._what)
        if not contains_archive:
            write_reference(folder, self._what)

    def _make_folder(self, model_id: str, folder: Path) -> None:
        """Publish the model's folder on this machine; the archive is linked, and takes no further space."""
        archive = Path(self._what.archive)
        with publish_folder(folder) as fresh:
            self._write(model_id, fresh, archive.is_file())
            if archive.is_file():
                link_or_copy(str(archive), str(fresh / ARCHIVE))

    def _upload(self, model_id: str, once: Once) -> None:
        """Send the files one by one; the archive under the name that it has in every model."""
        archive = Path(self._what.archive)
        contains_archive = archive.is_file() and archive.stat().st_size <= self._largest_upload * _GB
        if not contains_archive:
            _log.warning(
                "%s · the archive is not uploaded, the registered model refers to %s: %s",
                self._execution.job,
                archive,
                "it is larger than FEDSFT_LARGEST_UPLOAD" if archive.is_file() else "it does not exist here",
            )
        with tempfile.TemporaryDirectory(prefix="fedsft-model-") as parent:
            folder = Path(parent)
            self._write(model_id, folder, contains_archive)
            if contains_archive:
                (folder / ARCHIVE).symlink_to(archive)
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                into = file.parent.relative_to(folder).as_posix()
                send = partial(self._client.log_model_artifact, model_id, str(file), None if into == "." else into)
                once(f"{model_id}: {file.relative_to(folder)}", send)


def versions_of(client: MlflowClient, model: str) -> Iterator[ModelVersion]:
    """All versions of a registered model."""
    token = None
    while True:
        page = client.search_model_versions(f"name = '{model}'", page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def local_folder(location: str) -> Path | None:
    """The folder of an artifact location on this machine; None for one that is reached over the network."""
    url = urlsplit(location)
    if url.scheme == "file":
        return Path(url2pathname(url.path))
    return Path(location) if not url.scheme else None
