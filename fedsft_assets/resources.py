"""Dagster resources: thin, typed doors to the store, the source of raw data, the model preset and MLflow."""

from pathlib import Path

import dagster as dg

from fedsft_assets.settings import Settings
from fedsft_assets.specs import CheckSettings, ModelPreset, SplitSettings, model_preset
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking


class StoreResource(dg.ConfigurableResource):
    """Where every file of the study lives."""

    home: str

    @property
    def files(self) -> Store:
        return Store(Path(self.home))


class SourceResource(dg.ConfigurableResource):
    """Where raw data comes from: `sample`, `hub`, or a folder laid out as the published repositories are."""

    data: str

    @property
    def place(self) -> str:
        return Settings(data=self.data).source


class SplitsResource(dg.ConfigurableResource):
    """How records are split, for all datasets alike: a prompt then is in the same split everywhere."""

    seed: int
    proportions: list[float]
    max_rejected: float
    max_chars: int

    @property
    def settings(self) -> SplitSettings:
        return SplitSettings.model_validate(self.model_dump())


class ChecksResource(dg.ConfigurableResource):
    """What the asset checks allow, and how bad it is when they do not."""

    min_rows: float
    max_rows: float
    max_truncated: float
    max_duplicates: float
    languages: list[str]
    min_language_share: float
    severity: dict[str, str]

    @property
    def settings(self) -> CheckSettings:
        return CheckSettings.model_validate(self.model_dump())


class ModelResource(dg.ConfigurableResource):
    """The model preset, archive or folder that all jobs start from; `path` is where a preset's archive is."""

    preset: str
    path: str | None = None

    def load(self) -> ModelPreset:
        return model_preset(self.preset, Path(self.path) if self.path else None)


class RuntimeResource(dg.ConfigurableResource):
    """Where and how jobs run. `environment` is what their processes get beside that of Dagster."""

    name: str
    environment: dict[str, str]


class MLflowResource(dg.ConfigurableResource):
    """The tracking server, or the store under FEDSFT_HOME."""

    uri: str
    artifacts: str | None = None
    patience: float = 60.0

    @property
    def tracking(self) -> Tracking:
        return Tracking(self.uri, Path(self.artifacts) if self.artifacts else None, self.patience)


def resources(settings: Settings) -> dict[str, dg.ConfigurableResource]:
    """All resources, by the names that assets ask for."""
    tracking = settings.tracking
    return {
        "store": StoreResource(home=str(settings.home)),
        "source": SourceResource(data=settings.data),
        "splits": SplitsResource(**settings.splits.model_dump()),
        "checks": ChecksResource(**settings.checks.model_dump()),
        "model": ModelResource(preset=settings.model, path=str(settings.model_path) if settings.model_path else None),
        "runtime": RuntimeResource(name=settings.runtime, environment=settings.environment()),
        "mlflow": MLflowResource(
            uri=tracking.uri,
            artifacts=str(tracking.artifacts) if tracking.artifacts else None,
            patience=tracking.patience,
        ),
    }
