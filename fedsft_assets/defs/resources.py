"""Dagster resources: thin, typed doors to the store, the source of raw data, the model preset and MLflow."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from fedsft_assets.files import publish_file
from fedsft_assets.settings import Settings
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.limits import CheckSettings, SplitSettings
from fedsft_assets.specs.model_preset import ModelPreset, model_preset
from fedsft_assets.specs.runtime import RuntimeSettings
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.versions import NoVersionError, accepted, current, existing, make_current

CANDIDATES = "candidates"
"""The key of the IO manager that hands on what is still to be checked."""


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


class SplitsResource(SplitSettings, dg.ConfigurableResource):
    """How records are split, for all datasets alike: a prompt then is in the same split everywhere."""

    @property
    def settings(self) -> SplitSettings:
        return SplitSettings.model_validate(self.model_dump())


class ChecksResource(CheckSettings, dg.ConfigurableResource):
    """What the asset checks allow, and how bad it is when they do not."""

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
    """Where and how jobs run; the fields are those of RuntimeSettings."""

    name: str
    sites: list[str]
    poc: dict[str, Any]
    production: dict[str, Any]

    def settings(self, name: str | None = None, threads_per_trainer: int = 0) -> RuntimeSettings:
        """Those of the launchpad's, where it says something else."""
        own = {**self.model_dump(), "threads_per_trainer": threads_per_trainer}
        return RuntimeSettings.model_validate({**own, "name": name or self.name})


class MLflowResource(dg.ConfigurableResource):
    """The tracking server, or the store under FEDSFT_HOME."""

    uri: str
    artifacts: str | None = None
    patience: float = 60.0

    @property
    def tracking(self) -> Tracking:
        return Tracking(self.uri, Path(self.artifacts) if self.artifacts else None, self.patience)


class VersionIOManager(dg.ConfigurableIOManager):
    """How a version of one asset reaches the next: as its path in the store of `home`, never that of a link.

    A step gets what its own run made; in a re-execution from failure, what the run before it made, whatever others have
    made since. What its run did not make, it gets as it is current.

    A version of an asset with blocking checks is handed on when they have passed, and becomes current by their step.
    All others become current as they are made. `candidates` is for that step: it takes what is not checked yet.
    """

    home: str
    model: ModelResource
    candidates: bool = False

    def handle_output(self, context: dg.OutputContext, obj: Path) -> None:
        record = _record(Store(Path(self.home)), context.run_id, context.asset_key.path)
        with publish_file(record) as path:
            path.write_text(json.dumps({"version": str(obj.relative_to(self.home))}) + "\n", encoding="utf-8")
        if not _is_checked(context.asset_key):
            make_current(obj)

    def load_input(self, context: dg.InputContext) -> Path:
        upstream, key = context.upstream_output, context.asset_key
        assert upstream is not None, "Dagster gives it for every asset"
        version = self._made(upstream.run_id, key)
        if version is None and self.candidates:
            version = self._last_made(context, key)
        try:
            version = existing(version) if version else current(self._versions(key))
            return accepted(version) if _is_checked(key) and not self.candidates else version
        except NoVersionError as error:
            raise dg.Failure(str(error), allow_retries=False) from None

    def _made(self, run_id: str, key: dg.AssetKey) -> Path | None:
        """The version that a Dagster run made of an asset, if it made one."""
        try:
            return made_by(Store(Path(self.home)), run_id, key.path)
        except FileNotFoundError:
            return None

    def _last_made(self, context: dg.InputContext, key: dg.AssetKey) -> Path | None:
        """What a step of checks looks at that is executed by itself: what was materialized last."""
        event = context.instance.get_latest_materialization_event(key)
        return self._made(event.run_id, key) if event else None

    def _versions(self, key: dg.AssetKey) -> Path:
        """The folder of an asset's versions."""
        store, name = Store(Path(self.home)), key.path[-1]
        if key.path == ["base_model"]:
            return store.base_model(self.model.load().name)
        if key.path == [COMBINED]:
            return store.combined
        groups = {
            "raw": store.raw,
            "processed": store.processed,
            "job_folder": store.job_folder,
            "checkpoint": store.checkpoint,
            "evaluation": store.evaluation,
        }
        return groups.get(key.path[0], store.report)(name)


def made_by(store: Store, run_id: str, asset: Sequence[str]) -> Path:
    """The version that a Dagster run made of an asset. Raises FileNotFoundError if it made none."""
    return store.home / json.loads(_record(store, run_id, asset).read_text(encoding="utf-8"))["version"]


def all_made_by(store: Store, run_id: str) -> list[Path]:
    """All versions that a Dagster run made."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (store.made / run_id).glob("*.json")]
    return [store.home / record["version"] for record in records]


def _record(store: Store, run_id: str, asset: Sequence[str]) -> Path:
    return store.made / run_id / f"{'__'.join(asset)}.json"


def _is_checked(key: dg.AssetKey) -> bool:
    """Whether `checks.py` has blocking checks of the asset."""
    return key.path[0] in ("processed", COMBINED)


def resources(
    settings: Settings, sites: Iterable[str] = ()
) -> dict[str, dg.ConfigurableResource | dg.ConfigurableIOManager]:
    """All resources, by the names that assets ask for; `sites` are those of all jobs."""
    tracking = Tracking.of(settings)
    model = ModelResource(preset=settings.model, path=str(settings.model_path) if settings.model_path else None)
    home, runtime = str(settings.home), settings.where_jobs_run(sites)
    return {
        "io_manager": VersionIOManager(home=home, model=model),
        CANDIDATES: VersionIOManager(home=home, model=model, candidates=True),
        "store": StoreResource(home=home),
        "source": SourceResource(data=settings.data),
        "splits": SplitsResource(**settings.splits.model_dump()),
        "checks": ChecksResource(**settings.checks.model_dump()),
        "model": model,
        "runtime": RuntimeResource(
            **runtime.model_dump(mode="json", exclude={"threads_per_trainer"}, exclude_none=True)
        ),
        "mlflow": MLflowResource(
            uri=tracking.uri,
            artifacts=str(tracking.artifacts) if tracking.artifacts else None,
            patience=tracking.patience,
        ),
    }
