"""All settings that do not change a result, from environment variables FEDSFT_*, typed and with defaults that work."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedsft_assets.federation.poc_kits import PocSettings
from fedsft_assets.federation.production import ProductionSettings
from fedsft_assets.specs import HUB, SAMPLE, CheckSettings, SplitSettings
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking

PROJECT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Read anew wherever it is made; the process environment is the only source."""

    model_config = SettingsConfigDict(
        env_prefix="FEDSFT_", env_nested_delimiter="__", env_ignore_empty=True, populate_by_name=True
    )

    home: Path = Field(default=PROJECT / ".fedsft", description="where everything is written")
    data: str = Field(
        default="sample", description="'sample', 'hub', or a folder laid out as the published repositories are"
    )
    datasets: Path = Field(default=PROJECT / "datasets", description="the folder of dataset files")
    splits: SplitSettings = Field(default=SplitSettings(), description="how records are split")
    checks: CheckSettings = Field(default=CheckSettings(), description="what the asset checks allow")
    model: str = Field(
        default="tiny", description="a model preset, a .nemo archive, or the folder of one or of a Hugging Face model"
    )
    model_path: Path | None = Field(
        default=None, description="where the archive of gpt-1.3b or gpt-5b is, or the folder of its files"
    )
    jobs: Path = Field(default=PROJECT / "jobs", description="the folder of job files")
    prompts: Path = Field(
        default=Path(__file__).with_name("evaluation") / "prompts.yaml", description="the file of example prompts"
    )
    runtime: Literal["simulator", "poc", "production"] = Field(default="simulator", description="where jobs run")
    poc: PocSettings = Field(default=PocSettings(), description="how the POC on this machine is started")
    production: ProductionSettings = Field(default=ProductionSettings(), description="which federation, and as whom")
    mlflow_uri: str | None = Field(
        default=None, validation_alias="MLFLOW_TRACKING_URI", description="None is the store under `home`"
    )

    tracking_patience: float = Field(
        default=60.0, ge=0, description="seconds that a finished job waits for a tracking server that does not answer"
    )

    @field_validator("home", "jobs", "datasets", "prompts", "model_path")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().resolve() if path else path

    @property
    def store(self) -> Store:
        return Store(self.home)

    @property
    def tracking(self) -> Tracking:
        if self.mlflow_uri:
            return Tracking(self.mlflow_uri, patience=self.tracking_patience)
        return Tracking(self.store.mlflow_uri, self.store.mlflow_artifacts, self.tracking_patience)

    @property
    def source(self) -> str:
        """Where raw data comes from: `sample`, `hub`, or a folder's whole path. Raises ValueError for anything else."""
        if self.data in (SAMPLE, HUB):
            return self.data
        folder = Path(self.data).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError(f"FEDSFT_DATA: {self.data!r} is neither 'sample' nor 'hub' nor a folder")
        return str(folder)

    def environment(self) -> dict[str, str]:
        """Variables that keep libraries from writing anywhere but under `home`, and from the network."""
        cache = self.home / "cache"
        return {
            "FEDSFT_HOME": str(self.home),
            "DAGSTER_HOME": str(self.home / "dagster"),
            "DAGSTER_DISABLE_TELEMETRY": "1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MPLCONFIGDIR": str(cache / "matplotlib"),
            "HF_HOME": str(cache / "huggingface"),
            "XDG_CACHE_HOME": str(cache),
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
            "TOKENIZERS_PARALLELISM": "false",
        }
