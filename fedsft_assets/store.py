"""The layout of FEDSFT_HOME: the path of every file.

Independent of the files' contents.
"""

import re
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("training", "validation", "testing")
HOME_FOLDERS = (
    *("raw", "downloads", "processed", "combined", "base_models", "job_folders", "checkpoints", "evaluations"),
    *("made", "reports", "tasks"),
    *("flare", "tracking", "tensorboard", "mlartifacts", "cache", "dagster", "poc"),
)
"""All folders created at the top of a home; users may have others there."""


_SEED = ".seed-"
_OF_SEED = re.compile(rf"{re.escape(_SEED)}(\d+)$")


@dataclass(frozen=True)
class Store:
    """The layout of one FEDSFT_HOME; with a `seed`, of that part of a study over several seeds."""

    home: Path
    seed: int | None = None

    def _of_seed(self, name: str) -> str:
        return name if self.seed is None else f"{name}{_SEED}{self.seed}"

    def raw(self, dataset: str) -> Path:
        """The folder of all versions of a dataset's files, as its publisher laid them out."""
        return self.home / "raw" / dataset

    @property
    def downloads(self) -> Path:
        """Complete and partial downloads from the hub."""
        return self.home / "downloads"

    def processed(self, dataset: str) -> Path:
        return self.home / "processed" / dataset

    @property
    def combined(self) -> Path:
        return self.home / "combined"

    def splits(self, dataset: str) -> Path:
        """The folder of all versions of a dataset's three splits; `combined` is a dataset here too."""
        return self.combined if dataset == "combined" else self.processed(dataset)

    def base_model(self, preset: str) -> Path:
        """The folder of all versions of a preset's archive, each with the archive as `<preset>.nemo`."""
        return self.home / "base_models" / self._of_seed(preset)

    def job_folder(self, job: str) -> Path:
        """The folder of all versions of a job's folder."""
        return self.home / "job_folders" / self._of_seed(job)

    def checkpoint(self, job: str) -> Path:
        """The folder of all versions of a job's trained archive (`model.nemo`) with its report (`report.json`)."""
        return self.home / "checkpoints" / self._of_seed(job)

    def evaluation(self, model: str) -> Path:
        """The folder of all versions of the losses of a job's checkpoint, or of `base_model`."""
        return self.home / "evaluations" / self._of_seed(model)

    @property
    def made(self) -> Path:
        """Records of the version of each asset that a Dagster run made."""
        return self.home / "made"

    @property
    def reports(self) -> Path:
        return self.home / "reports"

    def report(self, name: str) -> Path:
        """The folder of all versions of the report `comparison` or `inference`."""
        return self.reports / name

    def tasks(self, checkpoint_digest: str) -> Path:
        """The folder of what a checkpoint scores in benchmark tasks."""
        return self.home / "tasks" / checkpoint_digest

    @property
    def tokenizers(self) -> Path:
        """Cached tokenizers of presets that are slow to load."""
        return self.home / "cache" / "tokenizers"

    def flare(self, job: str) -> Path:
        """The folder of a job's workspaces, one per subject."""
        return self.home / "flare" / job

    @property
    def outbox(self) -> Path:
        """Pending records for the tracking server."""
        return self.home / "tracking"

    @property
    def tensorboards(self) -> Path:
        """TensorBoard's event files of all jobs."""
        return self.home / "tensorboard"

    def tensorboard(self, job: str) -> Path:
        """Event files of the job's last execution, and of others still running."""
        return self.tensorboards / self._of_seed(job)

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.home / "mlartifacts"


def name_of(version: Path) -> str:
    """The name of what this is a version of, without its seed."""
    return _OF_SEED.sub("", version.parent.name)


def seed_of(versions: Path) -> int | None:
    """The seed that a folder of versions is for; None for the default one."""
    found = _OF_SEED.search(versions.name)
    return int(found[1]) if found else None


def archive_file(version: Path) -> Path:
    """The archive in a version of a base model."""
    return version / f"{name_of(version)}.nemo"


def split_file(folder: Path, split: str) -> Path:
    """The JSONL file of one split in a folder of splits."""
    return folder / f"{split}.jsonl"


def count_records(split: Path) -> int:
    """Number of records in a JSONL split."""
    with split.open("rb") as file:
        return sum(1 for line in file if line.strip())
