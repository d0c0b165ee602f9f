"""The tracking server or store, and how long it may take to answer.

MLflow itself waits two minutes for an answer and repeats a request seven times. Both are wrong here: whoever delivers
has all of it on the disk and tries again when it suits, and a request that is repeated may make things twice.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from fedsft_assets.credentials import as_given, redacted, take_credentials
from fedsft_assets.files import locked, publish_file
from fedsft_assets.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient


EXPERIMENT = "fedsft"
CHAMPION = "champion"
ANSWER_SECONDS = 10
_SQLITE = "sqlite:///"
_TIMEOUT, _RETRIES = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
# Names those of them that a process of ours has set: its children inherit them, and no user has said them.
_SET_BY_US = "FEDSFT_MLFLOW_LIMITS"
_SET_BY_USER = (frozenset(os.environ) & {_TIMEOUT, _RETRIES}) - {*os.environ.get(_SET_BY_US, "").split(",")}


@dataclass(frozen=True)
class Tracking:
    """A tracking server or store, and where its artifacts go if it is a new local store.

    `uri` has no password in it, whatever it was made with: what opens a server or database stays with this process.
    `patience` is how many seconds a job that has ended waits for what is still to be delivered.
    """

    uri: str
    artifacts: Path | None = None
    patience: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "uri", take_credentials(self.uri))

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """The tracking server that the settings name, else the store in their home."""
        if settings.mlflow_uri:
            return cls(settings.mlflow_uri, patience=settings.tracking_patience)
        return cls(settings.store.mlflow_uri, settings.store.mlflow_artifacts, settings.tracking_patience)

    @property
    def over_http(self) -> bool:
        return self.uri.startswith(("http://", "https://"))

    def client(self) -> MlflowClient:
        """A client whose requests `limit_requests` limits."""
        from mlflow import MlflowClient

        limit_requests()
        if self.uri.startswith(_SQLITE):
            _make_store(Path(self.uri.removeprefix(_SQLITE)), self.artifacts)
        with redacted():
            return MlflowClient(tracking_uri=as_given(self.uri))

    def experiment_id(self) -> str:
        """Of the one experiment that all jobs share; made when it is not there.

        Raises MlflowException if there is no answer in time.
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


def _make_store(database: Path, artifacts: Path | None) -> None:
    """Have a SQLite store there, whole: MLflow takes seconds to make one, and cannot go on with half of one.

    Of several processes that need it at the same time, one makes it and the others wait. Artifacts without another
    place go to `artifacts`: of the current folder, MLflow would take the path into SQL as Python writes it.
    """
    if database.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    artifacts = artifacts or database.parent / "mlruns"
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = database.with_name(f".{database.name}.lock")
    lock.touch()
    with locked(lock):
        if not database.exists():
            with publish_file(database) as fresh:
                SqlAlchemyStore(f"{_SQLITE}{fresh}", artifacts.as_uri())


def limit_requests(seconds: int | None = None) -> None:
    """Have MLflow, in this process, wait `seconds` for an answer and never repeat a request.

    MLflow's own variables say so; those that the user has set stay. Without `seconds`, an earlier limit stays, else it
    is ANSWER_SECONDS.
    """
    limits = {_TIMEOUT: str(seconds or os.environ.get(_TIMEOUT, ANSWER_SECONDS)), _RETRIES: "0"}
    ours = {name: value for name, value in limits.items() if name not in _SET_BY_USER}
    os.environ.update({**ours, _SET_BY_US: ",".join(ours)})


def timed_out(error: BaseException) -> bool:
    """Whether MLflow raised this because there was no answer in time."""
    from requests.exceptions import Timeout

    return isinstance(error.__cause__, Timeout)
