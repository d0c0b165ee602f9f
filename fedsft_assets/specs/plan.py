"""The plan of one site's trainer, fully resolved, in its part of a job folder."""

import math
from pathlib import Path
from typing import Self

from pydantic import model_validator

from fedsft_assets import __version__
from fedsft_assets.files import file_digest
from fedsft_assets.specs.job import (
    Algorithm,
    FedAvg,
    FiltersSpec,
    OptimizerState,
    PeftSpec,
    Precision,
    ScheduleSpan,
    Strategy,
    WireFormat,
    require_noise_on_all,
)
from fedsft_assets.specs.yaml_file import Spec, SpecError


class LocalWork(Spec):
    """How much a site trains in each round: steps and records, given its number of records."""

    local_epochs: float
    max_local_steps: int | None
    batch_size: int

    def steps(self, records: int) -> int:
        """Optimizer steps of one round over that many records."""
        steps = max(1, round(self.local_epochs * math.ceil(records / self.batch_size)))
        return min(steps, self.max_local_steps or steps)

    def samples(self, records: int) -> int:
        """Records that one round trains on, each pass counted."""
        epochs, steps = divmod(self.steps(records), math.ceil(records / self.batch_size))
        return epochs * records + min(steps * self.batch_size, records)


class ResolvedTraining(Spec):
    """A TrainingSpec with all values resolved; limits may be None."""

    batch_size: int
    micro_batch_size: int | None = None
    micro_batch_tokens: int | None = None
    learning_rate: float
    max_length: int
    answer_only_loss: bool = True
    warmup_ratio: float
    learning_rate_schedule: ScheduleSpan = "job"
    weight_decay: float
    gradient_clip: float
    precision: Precision
    activation_checkpointing: bool = False
    optimizer_state: OptimizerState
    devices: int = 1
    strategy: Strategy = "ddp"
    simulator_threads: int | None = None
    peft: PeftSpec | None = None


class SitePlan(Spec):
    """All instructions for a site's trainer, as one JSON file in its part of the job folder.

    Paths are relative to the study's home: `base_model` is `base_models/<preset>/<digest>/<preset>.nemo`, the files of
    records are `processed/<dataset>/<digest>/<split>.jsonl` and `combined/<digest>/<split>.jsonl`; see `located`.
    `digests` holds the SHA-256 of the record files of which the study has a copy; `package` is the version of this
    package that built the job folder.
    """

    package: str = __version__
    job: str
    site: str
    rounds: int
    local_epochs: float
    max_local_steps: int | None
    max_evaluation_records: int | None
    seed: int
    training: ResolvedTraining
    algorithm: Algorithm = FedAvg()
    wire: WireFormat = "fp32"
    filters: FiltersSpec = FiltersSpec()
    base_model: Path
    training_file: Path
    validation_file: Path
    digests: dict[str, str]

    @model_validator(mode="after")
    def _noise_on_all(self) -> Self:
        require_noise_on_all(self.algorithm, self.filters)
        return self

    @property
    def work(self) -> LocalWork:
        return LocalWork(
            local_epochs=self.local_epochs,
            max_local_steps=self.max_local_steps,
            batch_size=self.training.batch_size,
        )

    def located(self, home: Path) -> Self:
        """The plan with paths under `home`."""
        fields = ("base_model", "training_file", "validation_file")
        return self.model_copy(update={field: home / getattr(self, field) for field in fields})

    def verify_files(self) -> None:
        """Raise SpecError if a file is missing or differs from the one that the job folder was built for."""
        for field in ("training_file", "validation_file"):
            path: Path = getattr(self, field)
            if not path.is_file():
                raise SpecError(f"{self.site}: {field}: {path} is missing; build the data and the job folder again")
            if field in self.digests and file_digest(path) != self.digests[field]:
                raise SpecError(f"{self.site}: {field}: {path} has changed; build the job folder again")
