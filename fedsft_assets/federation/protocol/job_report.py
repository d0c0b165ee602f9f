"""What a finished job has to say for itself; it stands beside the checkpoint as `report.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from fedsft_assets.federation.protocol.points import TRAIN_LOSS, VAL_LOSS, Point
from fedsft_assets.files import publish_file
from fedsft_assets.specs.job import JobSpec

REPORT_FILE = "report.json"
MODEL_FILE = "model.nemo"


@dataclass(frozen=True)
class JobReport:
    """Losses are nats per answer token, `perplexity` is e to the test loss.

    `val_loss[k]` belongs to the global model after k rounds, scored on the combined validation split, and
    `samples[k]` says how many records all sites had trained on by then; k = 0 is the base model.
    `best_round` is the k whose model became the checkpoint. `tokens` are answer tokens trained on.
    `seconds` count from the start of the job to the finished checkpoint, over all attempts but without what lay
    between them; `phases` say where they went: each phase's at the site where it took longest (see
    `phases.PhaseClock`), and `save` for the checkpoint and its test.
    Digests are of content. `missed` are the sites that a round (1-based) went on without, `runtime` and `job_id`
    where it ran, `status` that runtime's last word for it. `history` is the execution of which all of this is: one
    unbroken chain of states at its server. `epsilon` is what a site spent of its privacy at most, where the job has a
    filter for that, and `releases` how many noisy changes it is for: also those of earlier executions over its data.
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
        """From the folder of a checkpoint."""
        return cls(**json.loads((folder / REPORT_FILE).read_text(encoding="utf-8")))

    def write(self, folder: Path) -> None:
        with publish_file(folder / REPORT_FILE) as path:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Curve:
    """The curve of the global model, and the tokens behind it."""

    samples: list[int]
    val_loss: list[float]
    tokens: int

    @property
    def best_round(self) -> int:
        """The round after which the loss was lowest; the base model does not count."""
        return min(range(1, len(self.val_loss)), key=self.val_loss.__getitem__)


def global_curve(points: list[Point], spec: JobSpec) -> Curve:
    """Raises ValueError if the points are not those of a job that went to its end."""
    losses = {p.round: p for p in points if p.name == VAL_LOSS and p.site is None}
    missing = [k for k in range(spec.rounds + 1) if k not in losses]
    if missing:
        raise ValueError(
            f"job {spec.name}: no val_loss after rounds {missing}; it ended before its {spec.rounds} rounds"
        )
    ordered = [losses[k] for k in range(spec.rounds + 1)]
    tokens = sum(p.tokens or 0 for p in points if p.name == TRAIN_LOSS and p.site is None)
    return Curve([p.samples for p in ordered], [p.value for p in ordered], tokens)
