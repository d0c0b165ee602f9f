"""The report of a finished job, stored beside its checkpoint as `report.json`."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from fedsft_assets.federation.protocol.points import TRAIN_LOSS, VAL_LOSS, Point
from fedsft_assets.files import publish_file
from fedsft_assets.specs.job import JobSpec

REPORT_FILE = "report.json"
MODEL_FILE = "model.nemo"


@dataclass(frozen=True)
class JobReport:
    """Losses are in nats per answer token; `perplexity` is exp(`test_loss`).

    `val_loss[k]` is the loss of the global model after k rounds on the combined validation split, and `samples[k]` the
    number of records all sites had trained on by then; k = 0 is the base model. `best_round` is the k whose model
    became the checkpoint. `tokens` are answer tokens trained on. `seconds` is the time from the start of the job to the
    finished checkpoint over all attempts, without the pauses between them; `phases` breaks it down: for each phase the
    time at the slowest site (see `phases.PhaseClock`), and `save` for writing and scoring the checkpoint. Digests are
    content digests. `missed` maps sites to the rounds (1-based) that they missed; `runtime` and `job_id` say where the
    job ran, `status` is its final status there. `history` is the id of the execution: one unbroken chain of server
    states. `epsilon` is the most privacy that any site has spent, if the job has a privacy filter, for `releases` noisy
    changes, including those of earlier executions over the same data. `seed` is the job's.

    `steps`, `traffic`, `cpu_seconds` and `peak_memory` are the job's costs (see `costs.Costs`). `elapsed[k]` is the
    part of `seconds` until `val_loss[k]` was known, by the server's clock, and `transferred[k]` the bytes sent and
    received by all sites until then. All of these are None in a report of an earlier version of this package.
    """

    job: str
    kind: str
    rounds: int
    best_round: int
    tokens: int
    samples: list[int]
    val_loss: list[float]
    test_loss: float
    perplexity: float
    seconds: float
    phases: dict[str, float]
    checkpoint_digest: str
    base_model_digest: str
    validation_digest: str
    runtime: str
    job_id: str
    status: str
    missed: dict[str, list[int]]
    epsilon: float | None = None
    history: str = ""
    releases: int | None = None
    seed: int | None = None
    steps: int | None = None
    traffic: dict[str, dict[str, int]] | None = None
    cpu_seconds: float | None = None
    peak_memory: int | None = None
    elapsed: list[float] | None = None
    transferred: list[int] | None = None

    @property
    def sent(self) -> int | None:
        """Bytes from all sites to the server."""
        return None if self.traffic is None else sum(one["sent"] for one in self.traffic.values())

    @property
    def received(self) -> int | None:
        """Bytes from the server to all sites."""
        return None if self.traffic is None else sum(one["received"] for one in self.traffic.values())

    @property
    def base_val_loss(self) -> float:
        return self.val_loss[0]

    @property
    def last_val_loss(self) -> float:
        return self.val_loss[-1]

    @property
    def best_val_loss(self) -> float:
        return self.val_loss[self.best_round]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the report from a checkpoint's folder."""
        return cls(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        with publish_file(folder / REPORT_FILE) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Curve:
    """The loss curve of the global model, and the number of tokens trained on.

    `times` are those at which the losses were known, in seconds since the epoch.
    """

    samples: list[int]
    val_loss: list[float]
    tokens: int
    times: list[float] = field(default_factory=list, compare=False)

    @property
    def best_round(self) -> int:
        """The round with the lowest loss, not counting the base model."""
        return min(range(1, len(self.val_loss)), key=self.val_loss.__getitem__)


def global_curve(points: list[Point], spec: JobSpec) -> Curve:
    """Raises ValueError if the points are not those of a finished job."""
    losses = {p.round: p for p in points if p.name == VAL_LOSS and p.site is None}
    missing = [k for k in range(spec.rounds + 1) if k not in losses]
    if missing:
        raise ValueError(
            f"job {spec.name}: no val_loss after rounds {missing}; it ended before its {spec.rounds} rounds"
        )
    ordered = [losses[k] for k in range(spec.rounds + 1)]
    tokens = sum(p.tokens or 0 for p in points if p.name == TRAIN_LOSS and p.site is None)
    return Curve([p.samples for p in ordered], [p.value for p in ordered], tokens, [p.time for p in ordered])
