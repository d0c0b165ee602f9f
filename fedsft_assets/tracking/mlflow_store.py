"""Connects to the MLflow tracking server or store, with request limits.

By default MLflow waits two minutes for an answer and retries seven times. Neither fits here: delivery has everything on
disk and retries by itself, and an automatic retry may create duplicates.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fedsft_assets.credentials import as_given, redacted, take_credentials
from fedsft_assets.files import locked_file, publish_file
from fedsft_assets.process_env import MLFLOW_PAGES
from fedsft_assets.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient


EXPERIMENT = "fedsft"
CHAMPION, CHALLENGER = "champion", "challenger"  # aliases of versions
ANSWER_SECONDS = 10
_SQLITE = "sqlite:///"
_TIMEOUT, _RETRIES = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# Lists which of them a fedsft process has set: child processes inherit them, but they are not the user's.
_SET_BY_US = "FEDSFT_MLFLOW_LIMITS"
_SET_BY_USER = (frozenset(os.environ) & {_TIMEOUT, _RETRIES}) - {*os.environ.get(_SET_BY_US, "").split(",")}


@dataclass(frozen=True)
class Tracking:
    """A tracking server or store, and the artifact folder of a new local store.

    `uri` never contains a password: credentials are kept separately in this process. `patience` is how many seconds a
    finished job waits for delivery. Archives of more than `largest_upload` GB are not sent to a server.
    """

    uri: str
    artifacts: Path | None = None
    patience: float = 60.0
    largest_upload: float = 10.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", take_credentials(self.uri))

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The tracking server named in the settings, otherwise the store in their home."""
        if settings.mlflow_uri:
            return cls(settings.mlflow_uri, None, settings.tracking_patience, settings.largest_upload)
        return cls(settings.store.mlflow_uri, settings.store.mlflow_artifacts, settings.tracking_patience)

    @property
    def over_http(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    @property
    def pages(self) -> str | None:
        """The address of MLflow's pages, if it is known: that of the server, or of the pages of `fedsft ui`."""
        address = self.uri if self.over_http else os.environ.get(MLFLOW_PAGES)
        return f"{address.rstrip('/')}/#" if address else None

    def client(self) -> MlflowClient:
        """An MLflow client, with requests limited by `limit_requests`."""
        from mlflow import MlflowClient

        limit_requests()
        if self.uri.startswith(_SQLITE):
            _make_store(Path(self.uri.removeprefix(_SQLITE)), self.artifacts)
        with redacted():
            return MlflowClient(tracking_uri=as_given(self.uri))

    def experiment_id(self) -> str:
        """Id of the experiment that all jobs share; created if it does not exist.

        Raises MlflowException on a timeout.
        """
        from mlflow.exceptions import MlflowException

        with redacted():
            client = self.client()
            if existing := client.get_experiment_by_name(EXPERIMENT):
                return str(existing.experiment_id)
            try:
                return str(client.create_experiment(EXPERIMENT, self.artifacts.as_uri() if self.artifacts else None))
            except MlflowException as error:
                existing = client.get_experiment_by_name(EXPERIMENT)
                if existing is None:
                    raise error
                return str(existing.experiment_id)


def registered_model(preset: str) -> str:
    """The name of the registered model that has the checkpoints of all jobs that start from this preset."""
    return f"fedsft-{preset}"


def _make_store(database: Path, artifacts: Path | None) -> None:
    """Create a SQLite store atomically: MLflow takes seconds for it, and cannot continue from a partial one.

    Concurrent processes wait for the one that creates it. The default artifact folder is made explicit, because MLflow
    would insert the current folder's path into SQL unescaped.
    """
    if database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    artifacts = artifacts or database.parent / "mlruns"
    with locked_file(database.with_name(f".{database.name}.lock")):
        if not database.exists():
            with publish_file(database) as fresh:
                SqlAlchemyStore(f"{_SQLITE}{fresh}", artifacts.as_uri())


def limit_requests(seconds: int | None = None) -> None:
    """Make MLflow in this process wait `seconds` for an answer and never retry.

    Sets MLflow's environment variables, except those that the user has set. Without `seconds`, an earlier limit is
    kept; the default is ANSWER_SECONDS.
    """
    limits = {_TIMEOUT: str(seconds or os.environ.get(_TIMEOUT, ANSWER_SECONDS)), _RETRIES: "0"}
    ours = {name: value for name, value in limits.items() if name not in _SET_BY_USER}
    os.environ.update({**ours, _SET_BY_US: ",".join(ours)})


def timed_out(error: BaseException) -> bool:
    """Whether MLflow raised this error because of a timeout."""
    from requests.exceptions import Timeout

    return isinstance(error.__cause__, Timeout)
