"""All settings that do not change a result: environment variables FEDSFT_*, typed, with working defaults.

Values that are not set in the environment but remembered by the home (data, model, folders) come from `home.json`.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from fedsft_assets.credentials import URI, take_credentials
from fedsft_assets.home_file import read_home
from fedsft_assets.specs.dataset import HUB, SAMPLE
from fedsft_assets.specs.job import DEFAULT_SEED
from fedsft_assets.specs.limits import CheckSettings, SplitSettings
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.runtime import PocSettings, ProductionSettings, RuntimeSettings
from fedsft_assets.store import Store

MOST_SEEDS = 100
PROJECT = Path(__file__).resolve().parent.parent
# Not representable in the SQLite URLs of MLflow and Dagster: `?` starts their options, `%41` means A.
_NOT_IN_URLS = re.compile(r"\?|%[0-9A-Fa-f]{2}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class _HomeSource(PydanticBaseSettingsSource):
    """Values remembered by the home, for settings that were not given."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError("all values come at once")

    def __call__(self) -> dict[str, Any]:
        given = self.current_state.get("home")
        home = _absolute(Path(given)) if given else Settings.model_fields["home"].default
        found = read_home(home, PROJECT)
        return dict(found.values) if found else {}


class Settings(BaseSettings):
    """Read on every instantiation, from the process environment, then from what the home remembers."""

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
    seeds: Annotated[list[int], NoDecode] = Field(
        default=[],
        description="how many seeds every job is trained with, as 3, or which, as 7,8,9; default: each job's own",
    )
    prompts: Path = Field(
        default=Path(__file__).with_name("evaluation") / "prompts.yaml", description="the file of example prompts"
    )
    runtime: Literal["simulator", "poc", "production"] = Field(default="simulator", description="where jobs run")
    poc: PocSettings = Field(default=PocSettings(), description="how the POC on this machine is started")
    production: ProductionSettings = Field(default=ProductionSettings(), description="which federation, and as whom")
    mlflow_uri: str | None = Field(
        default=None,
        validation_alias=URI,
        description="None means the store under `home`; never contains a password",
    )
    tracking_patience: float = Field(
        default=60.0, ge=0, description="seconds that a finished job waits for a tracking server that does not answer"
    )
    largest_upload: float = Field(
        default=10.0, ge=0, description="GB of the largest archive that is sent to a tracking server with its model"
    )
    ui_token_file: Path | None = Field(
        default=None, description="file with the token of the web interfaces; None generates one at every start"
    )
    pass_environment: str = Field(
        default="",
        pattern=r"^\s*([A-Za-z_]\w*\s*(,\s*[A-Za-z_]\w*\s*)*)?$",
        description="variables also passed to the processes of sites, as A,B; read by `child_environment`",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 there are no such files
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _HomeSource(settings_cls)

    @field_validator("home", "jobs", "datasets", "prompts", "model_path", "ui_token_file")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return _absolute(path) if path else path

    @field_validator("seeds", mode="before")
    @classmethod
    def _each_seed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            numbers = [int(number) for number in value.split(",")]
        except ValueError:
            raise ValueError(f"{value!r}: expected a number of seeds, as 3, or a list of them, as 7,8,9") from None
        if len(numbers) == 1:
            if not 1 <= numbers[0] <= MOST_SEEDS:
                raise ValueError(f"{value!r} seeds: expected 1 to {MOST_SEEDS}")
            return [*range(DEFAULT_SEED, DEFAULT_SEED + numbers[0])] if numbers[0] > 1 else []
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"{value!r}: has a seed twice")
        return numbers

    @field_validator("mlflow_uri")
    @classmethod
    def _without_credentials(cls, uri: str | None) -> str | None:
        return take_credentials(uri) if uri else uri

    @field_validator("home")
    @classmethod
    def _usable(cls, home: Path) -> Path:
        if wrong := _NOT_IN_URLS.search(str(home)) or _UNPRINTABLE.search(str(home)):
            raise ValueError(
                f"{ascii(str(home))[1:-1]} contains {wrong.group()!a}, which SQLite URLs cannot represent, so neither"
                " MLflow nor Dagster can work there; set FEDSFT_HOME to a folder whose path has no '?', no '%' before"
                " two hexadecimal digits, and no control characters"
            )
        return home

    @property
    def store(self) -> Store:
        return Store(self.home)

    def where_jobs_run(self, sites: Iterable[str] = ()) -> RuntimeSettings:
        """The runtime settings; `sites` are those that a POC is started for."""
        return RuntimeSettings(name=self.runtime, sites=list(sites), poc=self.poc, production=self.production)

    @property
    def project(self) -> Path:
        """The folder of this project's own jobs and datasets."""
        return PROJECT

    @property
    def purpose(self) -> dict[str, str]:
        """What a home remembers, with absolute paths."""
        data = self.data if self.data in (SAMPLE, HUB) else str(_absolute(Path(self.data)))
        model = self.model if self.model in PRESETS else str(_absolute(Path(self.model)))
        fixed = {"data": data, "model": model, "datasets": str(self.datasets), "jobs": str(self.jobs)}
        may_change = {
            "model_path": str(self.model_path or ""),
            "seeds": ",".join(map(str, self.seeds)),
        }
        return {**fixed, **{name: value for name, value in may_change.items() if value}}

    @property
    def usual(self) -> dict[str, str]:
        """The default `purpose`."""
        return {name: str(type(self).model_fields[name].default) for name in ("data", "model", "datasets", "jobs")}

    @property
    def source(self) -> str:
        """Source of raw data: `sample`, `hub`, or a folder's absolute path. Raises ValueError for anything else."""
        if self.data in (SAMPLE, HUB):
            return self.data
        folder = Path(self.data).expanduser().resolve()
        if not folder.is_dir():
            raise ValueError(f"FEDSFT_DATA: {self.data!r} is neither 'sample' nor 'hub' nor a folder")
        return str(folder)


def _absolute(path: Path) -> Path:
    return path.expanduser().resolve()
