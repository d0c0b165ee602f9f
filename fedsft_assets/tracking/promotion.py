"""Moves the aliases `champion` and `challenger` in MLflow's registry, as an evaluation has decided.

A decision lies on disk until it is delivered. There is at most one for each registered model: a later one counts more.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

from fedsft_assets.credentials import redact
from fedsft_assets.files import locked
from fedsft_assets.tracking.mlflow_store import CHALLENGER, CHAMPION, Tracking
from fedsft_assets.tracking.record import write_json
from fedsft_assets.tracking.registry import versions_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

DECISION_TAG = "decision"
_FOLDER = ".promotions"  # in the outbox, which takes only other names for entries

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class NotRegisteredYetError(RuntimeError):
    """A checkpoint that was judged is not registered yet; it waits in the outbox."""


@dataclass(frozen=True)
class Champion:
    """The version with the alias `champion`: digest and archive of its checkpoint, as registered."""

    version: str
    digest: str
    archive: str
    source: str


@dataclass(frozen=True)
class Promotion:
    """A decision about the versions of `model`: digests of champion and challenger, and the reason for each judged one.

    It was made when the champion was `over`, on the testing split of the digest `split`.
    """

    model: str
    split: str
    over: str | None
    champion: str | None
    challenger: str | None
    reasons: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Self:
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Promotions:
    """The decisions to be delivered, in a folder of the outbox `outbox`, and the last known champion of each model."""

    outbox: Path

    @property
    def folder(self) -> Path:
        return self.outbox / _FOLDER

    def pending(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def put(self, promotion: Promotion) -> None:
        """Store a decision, in place of an earlier one about this model."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder):
            write_json(self.folder / f"{promotion.model}.json", asdict(promotion))

    def champion(self, tracking: Tracking, model: str) -> Champion | None:
        """The champion of `model`; the last known one if the tracking server does not answer in time."""
        known = self.folder / f"{model}.known"
        answer = within(tracking.patience, lambda: [_champion(tracking.client(), model)])
        if answer is None:
            return Champion(**json.loads(known.read_text(encoding="utf-8"))) if known.is_file() else None
        (champion,) = answer
        if champion:
            write_json(known, asdict(champion))
        else:
            known.unlink(missing_ok=True)
        return champion

    def deliver(self, tracking: Tracking, path: Path, registering: Collection[str]) -> None:
        """Deliver one of the pending decisions; `registering` are digests of checkpoints that wait in the outbox.

        Can be repeated after any failure. Raises BlockingIOError if another process delivers, NotRegisteredYetError,
        and MLflow's errors.
        """
        delivering = self.folder / "delivering"  # not the folder itself, whose lock `put` waits for
        delivering.mkdir(exist_ok=True)
        with locked(delivering, wait=False):
            if not path.is_file():
                return  # delivered meanwhile
            promotion = Promotion.read(path)
            _promote(tracking.client(), promotion, registering)
            with locked(self.folder):
                if Promotion.read(path) == promotion:  # not replaced meanwhile
                    path.unlink()
            _log.info("%s: champion and challenger are as the comparison decided", promotion.model)


def within(seconds: float, do: Callable[[], _Result]) -> _Result | None:
    """The result of `do`, which may go on in a thread of its own; None if it raises or takes longer."""
    results: list[_Result] = []

    def run() -> None:
        try:
            results.append(do())
        except Exception as error:  # whatever MLflow says
            _log.warning("MLflow's registry: %s", redact(str(error).partition("[SQL: ")[0]))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(seconds, 0))
    return results[0] if results else None


def _champion(client: MlflowClient, model: str) -> Champion | None:
    found = _alias(client, model, CHAMPION)
    if found is None:
        return None
    return Champion(
        str(found.version), found.tags.get("digest", ""), found.tags.get("archive", ""), str(found.source or "")
    )


def _alias(client: MlflowClient, model: str, alias: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(model, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _promote(client: MlflowClient, what: Promotion, registering: Collection[str]) -> None:
    versions = {
        version.tags.get("digest"): version for version in _oldest_first(client, what.model)
    }  # the newest stays
    if waiting := {*what.reasons, what.champion, what.challenger} & {*registering} - versions.keys():
        raise NotRegisteredYetError(f"{len(waiting)} of the checkpoints that were compared are not registered yet")
    now = _alias(client, what.model, CHAMPION)
    holds = (now.tags.get("digest") if now else None) in (what.over, what.champion)
    for digest, reason in what.reasons.items():
        if version := versions.get(digest):
            said = reason if holds else "not compared with the champion, which was set meanwhile; compare again"
            client.set_model_version_tag(what.model, version.version, DECISION_TAG, f"{said} [split {what.split[:12]}]")
    champion = versions.get(what.champion) if what.champion else None
    if holds and champion and (now is None or now.tags.get("digest") != what.champion):
        client.set_registered_model_alias(what.model, CHAMPION, champion.version)
    best = what.challenger if holds or what.champion == what.over else what.champion
    if best and (challenger := versions.get(best)):
        client.set_registered_model_alias(what.model, CHALLENGER, challenger.version)
    elif _alias(client, what.model, CHALLENGER):
        client.delete_registered_model_alias(what.model, CHALLENGER)


def _oldest_first(client: MlflowClient, model: str) -> Iterator[ModelVersion]:
    yield from sorted(versions_of(client, model), key=lambda version: int(version.version))
