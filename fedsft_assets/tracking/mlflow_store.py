"""The tracking server or store, and how long it may take to answer.

MLflow itself waits two minutes for an answer and tries seven times again. Both are wrong here: whoever asks
has a journal and tries again when it suits, and asking twice what was taken the first time makes things twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedsft_assets.credentials import as_given, redacted, take_credentials
from fedsft_assets.files import locked, publish_file
from fedsft_assets.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient


EXPERIMENT = "fedsft"
CHAMPION = "champion"
ANSWER_SECONDS = 10.0
_SQLITE = "sqlite:///"

_seconds: ContextVar[float | None] = ContextVar("seconds that MLflow may take to answer", default=None)


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
        from mlflow import MlflowClient

        if self.uri.startswith(_SQLITE):
            _make_store(Path(self.uri.removeprefix(_SQLITE)), self.artifacts)
        with redacted():
            return MlflowClient(tracking_uri=as_given(self.uri))

    def experiment_id(self) -> str:
        """Of the one experiment that all jobs share; made when it is not there.

        Raises MlflowException, after a few times ANSWER_SECONDS if there is no answer.
        """
        from mlflow.exceptions import MlflowException

        with redacted(), answer_within(_seconds.get() or ANSWER_SECONDS):
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


@contextmanager
def answer_within(seconds: float) -> Iterator[None]:
    """In this block and thread, MLflow gives a request so long to be answered, and never repeats it.

    Others in this process, and processes that it starts, keep MLflow's own limits.
    """
    _let_requests_be_limited()
    token = _seconds.set(seconds)
    try:
        yield
    finally:
        _seconds.reset(token)


def timed_out(error: BaseException) -> bool:
    """Whether MLflow raised this because there was no answer in time."""
    from requests.exceptions import Timeout

    return isinstance(error.__cause__, Timeout)


@cache
def _let_requests_be_limited() -> None:
    """MLflow takes its limits from the environment only, which is that of all threads and children."""
    from mlflow.utils import rest_utils

    request = rest_utils._get_http_response_with_retries

    @wraps(request)
    def limited(method: str, url: str, max_retries: int, *args: Any, **rest: Any) -> Any:
        seconds = _seconds.get()
        if seconds is None:
            return request(method, url, max_retries, *args, **rest)
        return request(method, url, 0, *args, **{**rest, "timeout": seconds})

    rest_utils._get_http_response_with_retries = limited
