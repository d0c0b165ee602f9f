"""Where every file lives under FEDSFT_HOME, how it gets there whole, and how its content is named.

Nothing here knows what is inside the files: only paths, atomic publication and digests.
"""

from dataclasses import dataclass
from pathlib import Path

SPLITS = ("training", "validation", "testing")
HOME_FOLDERS = (
    *("raw", "downloads", "processed", "combined", "base_models", "job_folders", "checkpoints", "evaluations"),
    *("made", "reports"),
    *("flare", "tracking", "tensorboard", "mlartifacts", "cache", "dagster", "poc"),
)
"""All folders that are made at the top of a home; a user may have others there."""


@dataclass(frozen=True)
class Store:
    """The layout of one FEDSFT_HOME."""

    home: Path

    def raw(self, dataset: str) -> Path:
        """The folder of all versions of a dataset's files, as its publisher laid them out."""
        return self.home / "raw" / dataset

    @property
    def downloads(self) -> Path:
        """What came from the hub, whole or so far."""
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
        return self.home / "base_models" / preset

    def job_folder(self, job: str) -> Path:
        """The folder of all versions of a job's folder."""
        return self.home / "job_folders" / job

    def checkpoint(self, job: str) -> Path:
        """The folder of all versions of a job's trained archive (`model.nemo`) with its report (`report.json`)."""
        return self.home / "checkpoints" / job

    def evaluation(self, model: str) -> Path:
        """The folder of all versions of the losses of a job's checkpoint, or of `base_model`."""
        return self.home / "evaluations" / model

    @property
    def made(self) -> Path:
        """Which version of each asset a Dagster run made."""
        return self.home / "made"

    @property
    def reports(self) -> Path:
        return self.home / "reports"

    def report(self, name: str) -> Path:
        """The folder of all versions of the report `comparison` or `inference`."""
        return self.reports / name

    @property
    def tokenizers(self) -> Path:
        """Tokenizers of presets that are slow to load."""
        return self.home / "cache" / "tokenizers"

    def flare(self, job: str) -> Path:
        """The folder of a job's workspaces, one for each subject that is executed."""
        return self.home / "flare" / job

    @property
    def outbox(self) -> Path:
        """What the tracking server has not taken yet."""
        return self.home / "tracking"

    @property
    def tensorboards(self) -> Path:
        """TensorBoard's event files of all jobs."""
        return self.home / "tensorboard"

    def tensorboard(self, job: str) -> Path:
        """Those of the job's last execution, and of others that go on."""
        return self.tensorboards / job

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.home / "mlartifacts"


def archive_file(version: Path) -> Path:
    """The archive in a version of a base model."""
    return version / f"{version.parent.name}.nemo"


def split_file(folder: Path, split: str) -> Path:
    """The JSONL file of one split in a folder of splits."""
    return folder / f"{split}.jsonl"


def count_records(split: Path) -> int:
    """Of a JSONL split, by its lines."""
    with split.open("rb") as file:
        return sum(1 for line in file if line.strip())
