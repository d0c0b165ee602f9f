"""The MLflow record of one execution of a job, as files that survive its process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from fedsft_assets.files import publish_file
from fedsft_assets.tracking.datasets import UsedSplit

Status = Literal["FINISHED", "FAILED", "KILLED"]


def write_json(path: Path, data: dict[str, Any]) -> None:
    with publish_file(path) as fresh:
        fresh.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@dataclass
class TrackedExecution:
    """One execution of a job, from its first attempt to its end.

    `id` is a tag of its MLflow runs, so that they can be found if the answer to their creation was lost. `begun` is in
    seconds since the epoch. `runs` maps JOB and site names to the ids of known MLflow runs. `ended`: the last attempt
    has ended, successfully or not. `splits` are empty in records of an earlier version.
    """

    id: str
    job: str
    sites: list[str]
    params: dict[str, str]
    tags: dict[str, str]
    note: str
    begun: float
    runs: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    splits: list[UsedSplit] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises FileNotFoundError, ValueError or TypeError."""
        data = json.loads(path.read_text(encoding="utf-8"))
        splits = [UsedSplit(**split) for split in data.pop("splits", [])]
        return cls(**data, splits=splits)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))


@dataclass(frozen=True)
class Registration:
    """A checkpoint to register as a version of `model`; `data` is the digest of the data it was scored on."""

    model: str
    archive: str
    digest: str
    test_loss: float
    data: str


@dataclass(frozen=True)
class Ending:
    """How an execution ended; `at` is in seconds since the epoch, `results` are metrics without a curve."""

    status: Status
    at: float
    results: dict[str, float] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    registration: Registration | None = None

    @classmethod
    def read(cls, path: Path) -> Self:
        data = json.loads(path.read_text(encoding="utf-8"))
        registration = data.pop("registration")
        return cls(**data, registration=Registration(**registration) if registration else None)

    def write(self, path: Path) -> None:
        write_json(path, asdict(self))
