"""Dagster resources: thin, typed access to the store, the source of raw data, the model preset and MLflow."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from fedsft_assets.defs.seeds import of_partition, partition_of, study_runs
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
"""Key of the IO manager for versions that are still to be checked."""


class StoreResource(dg.ConfigurableResource):
    """The store with all files of the study."""

    home: str

    @property
    def files(self) -> Store:
        return Store(Path(self.home))

    def of_run(self, run: dg.DagsterRun) -> Store:
        """The part of the store for the run's seed."""
        return of_partition(self.files, partition_of(run.tags))


class SourceResource(dg.ConfigurableResource):
    """Where raw data comes from: `sample`, `hub`, or a folder laid out as the published repositories are."""

    data: str

    @property
    def place(self) -> str:
        return Settings(data=self.data).source


class SplitsResource(SplitSettings, dg.ConfigurableResource):
    """How records are split, equally for all datasets, so that a prompt is in the same split everywhere."""

    @property
    def settings(self) -> SplitSettings:
        return SplitSettings.model_validate(self.model_dump())


class ChecksResource(CheckSettings, dg.ConfigurableResource):
    """Thresholds and severities of the asset checks."""

    @property
    def settings(self) -> CheckSettings:
        return CheckSettings.model_validate(self.model_dump())


class ModelResource(dg.ConfigurableResource):
    """The model preset, archive or folder that all jobs start from; `path` is that of a preset's archive."""

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
        """The runtime settings, with the launchpad's overrides."""
        own = {**self.model_dump(), "threads_per_trainer": threads_per_trainer}
        return RuntimeSettings.model_validate({**own, "name": name or self.name})


class MLflowResource(dg.ConfigurableResource):
    """The tracking server, or the store under FEDSFT_HOME."""

    uri: str
    artifacts: str | None = None
    patience: float = 60.0
    largest_upload: float = 10.0

    @property
    def tracking(self) -> Tracking:
        artifacts = Path(self.artifacts) if self.artifacts else None
        return Tracking(self.uri, artifacts, self.patience, self.largest_upload)


class VersionIOManager(dg.ConfigurableIOManager):
    """Passes a version of an asset to downstream assets as its path in the store of `home`, never as a link.

    A step gets the version that its own run made; in a re-execution from failure, the one that the failed run made,
    even if newer ones exist; in a study of several runs, the one that another run of it made. If there is none, it gets
    the current version. A step without a seed gets the versions of all seeds of an upstream asset, by partition.

    A version of an asset with blocking checks is passed on once they have passed; their step makes it current. All
    other versions become current when made. `candidates` is for the check step: it loads unchecked versions.
    """

    home: str
    model: ModelResource
    candidates: bool = False

    def handle_output(self, context: dg.OutputContext, obj: Path) -> None:
        partition = context.partition_key if context.has_asset_partitions else None
        record = _record(Store(Path(self.home)), context.run_id, context.asset_key.path, partition)
        with publish_file(record) as path:
            path.write_text(json.dumps({"version": str(obj.relative_to(self.home))}) + "\n", encoding="utf-8")
        if not _is_checked(context.asset_key):
            make_current(obj)

    def load_input(self, context: dg.InputContext) -> Path | dict[str, Path]:
        if not context.has_asset_partitions:
            return self._load(context, None)
        versions = {partition: self._load(context, partition) for partition in context.asset_partition_keys}
        return versions if len(versions) > 1 else next(iter(versions.values()))

    def _load(self, context: dg.InputContext, partition: str | None) -> Path:
        upstream, key = context.upstream_output, context.asset_key
        assert upstream is not None, "Dagster sets it for every asset"
        runs = study_runs(upstream.run_id, context.step_context.run_tags)
        version = next(filter(None, (self._made(run_id, key, partition) for run_id in runs)), None)
        if version is None and self.candidates:
            version = self._last_made(context, key)
        try:
            version = existing(version) if version else current(self._versions(key, partition))
            return accepted(version) if _is_checked(key) and not self.candidates else version
        except NoVersionError as error:
            raise dg.Failure(str(error), allow_retries=False) from None

    def _made(self, run_id: str, key: dg.AssetKey, partition: str | None = None) -> Path | None:
        """The version of an asset that a Dagster run made, or None."""
        try:
            return made_by(Store(Path(self.home)), run_id, key.path, partition)
        except FileNotFoundError:
            return None

    def _last_made(self, context: dg.InputContext, key: dg.AssetKey) -> Path | None:
        """The last materialized version, for a check step that is executed alone."""
        event = context.instance.get_latest_materialization_event(key)
        return self._made(event.run_id, key) if event else None

    def _versions(self, key: dg.AssetKey, partition: str | None) -> Path:
        """The folder of an asset's versions."""
        store, name = of_partition(Store(Path(self.home)), partition), key.path[-1]
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


def made_by(store: Store, run_id: str, asset: Sequence[str], partition: str | None = None) -> Path:
    """The version of an asset that a Dagster run made. Raises FileNotFoundError if it made none."""
    return store.home / json.loads(_record(store, run_id, asset, partition).read_text(encoding="utf-8"))["version"]


def all_made_by(store: Store, run_id: str) -> list[Path]:
    """All versions that a Dagster run made."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (store.made / run_id).glob("*.json")]
    return [store.home / record["version"] for record in records]


def _record(store: Store, run_id: str, asset: Sequence[str], partition: str | None) -> Path:
    return store.made / run_id / f"{'__'.join(asset)}{f'@{partition}' if partition else ''}.json"


def _is_checked(key: dg.AssetKey) -> bool:
    """Whether `checks.py` defines blocking checks for the asset."""
    return key.path[0] in ("processed", COMBINED)


def resources(
    settings: Settings, sites: Iterable[str] = ()
) -> dict[str, dg.ConfigurableResource | dg.ConfigurableIOManager]:
    """All resources by name; `sites` are the sites of all jobs."""
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
            largest_upload=tracking.largest_upload,
        ),
    }
