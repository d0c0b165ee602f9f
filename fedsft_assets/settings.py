"""All settings that do not change a result, from environment variables FEDSFT_*, typed and with defaults that work."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from fedsft_assets.store import Store

PROJECT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Read anew wherever it is made; the process environment is the only source."""

    model_config = SettingsConfigDict(env_prefix="FEDSFT_", env_ignore_empty=True, populate_by_name=True)

    home: Path = Field(default=PROJECT / ".fedsft", description="where everything is written")
    data: str = Field(default="sample", description="'sample', or a folder laid out as the published repositories are")
    model: str = Field(default="tiny", description="a model preset, or a Hugging Face causal LM folder")
    jobs: Path = Field(default=PROJECT / "jobs", description="the folder of job files")
    runtime: Literal["simulator"] = Field(default="simulator", description="where jobs run")
    mlflow_uri: str | None = Field(
        default=None, validation_alias="MLFLOW_TRACKING_URI", description="None is the store under `home`"
    )

    @field_validator("home", "jobs")
    @classmethod
    def _absolute(cls, path: Path) -> Path:
        return path.expanduser().resolve()

    @property
    def store(self) -> Store:
        return Store(self.home)

    @property
    def source(self) -> Path | None:
        """The folder of raw data, or None for the embedded sample. Raises ValueError if there is no such folder."""
        if self.data == "sample":
            return None
        folder = Path(self.data).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError(f"FEDSFT_DATA: {self.data!r} is neither 'sample' nor a folder")
        return folder

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
