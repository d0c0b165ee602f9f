"""The NVFlare job folder of a JobSpec, which NVFlare's own tools accept too.

It contains `meta.json`, `app_server/`, an `app_<site>/` with `config/plan.json` for each site, and `job.json`, the
JobSpec with all overrides. Data and base model are referenced by digest, relative to the home. It contains no code:
server and sites run the package that is installed there, with the `python3` on their path.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, Self

from fedsft_assets import __version__
from fedsft_assets.federation.noise_ratio import NoiseRatio, noise_ratio
from fedsft_assets.federation.protocol.site_messages import RoundLimits
from fedsft_assets.files import digest_of, file_digest, folder_digest
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.specs.model_preset import ModelPreset
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.store import Store, archive_file, count_records, split_file
from fedsft_assets.versions import adding, current, make_current

SPEC_FILE = "job.json"
_MANIFEST = "manifest.json"  # the SHA-256 of every other file
_PLAN = "config/plan.json"
# Task requests of all sites together. NVFlare's default interval of 2 s adds noticeably to the rounds of a few sites.
_REQUESTS_PER_SECOND, _MAX_REQUEST_INTERVAL = 20, 2.0


class JobFolderError(ValueError):
    """A job folder was modified, or was built by another version of this package."""


@dataclass(frozen=True)
class JobFolder:
    """A version of a job folder in the store of a home, parsed once.

    The paths of `plans`, one for each site in the order of the spec, are relative to the home.
    """

    path: Path
    spec: JobSpec
    plans: tuple[SitePlan, ...]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a folder that has passed `verify_job_folder`."""
        spec = JobSpec.model_validate_json((path / SPEC_FILE).read_text(encoding="utf-8"))
        plans = [(path / f"app_{site}" / _PLAN).read_text(encoding="utf-8") for site in spec.sites]
        return cls(path, spec, tuple(map(SitePlan.model_validate_json, plans)))

    @property
    def home(self) -> Path:
        return self.path.parents[2]

    @property
    def digest(self) -> str:
        """Digest of all files in the folder."""
        return self.path.name

    @property
    def data_version(self) -> str:
        """Digest of all that decides what is trained, on what and from what: the spec, the plans and their files.

        Not of the validation split: with another one the folder has another `digest`, and no checkpoint is stale.
        """
        parts = {SPEC_FILE: self.spec.model_dump_json()}
        for plan in self.plans:
            known = plan.model_dump(mode="json", exclude={"validation_file": True, "digests": {"validation_file"}})
            if "training_file" in plan.digests:  # what is in the file counts, not the version that it is in
                del known["training_file"]
            parts[plan.site] = json.dumps(known, sort_keys=True)
        return digest_of({name: hashlib.sha256(text.encode()).hexdigest() for name, text in parts.items()})

    @property
    def located_plans(self) -> list[SitePlan]:
        """The plans with the paths of this machine."""
        return [plan.located(self.home) for plan in self.plans]

    @property
    def base_model(self) -> Path:
        """Path of the base model's archive."""
        return self.home / self.plans[0].base_model

    @property
    def absent_private_sites(self) -> list[str]:
        """Sites whose data is private and not on this machine."""
        private = self.spec.private_sites
        return [
            plan.site for plan in self.plans if plan.site in private and not (self.home / plan.training_file).is_file()
        ]


@dataclass(frozen=True)
class JobInputs:
    """The versions that a job is built from: the base model, the combined splits, and the splits of its sites."""

    base_model: Path
    combined: Path
    datasets: Mapping[str, Path]

    @classmethod
    def current(cls, spec: JobSpec, preset: ModelPreset, store: Store) -> Self:
        """The current versions in the store. Raises NoVersionError."""
        return cls(
            base_model=current(store.base_model(preset.name)),
            combined=current(store.combined),
            datasets={name: current(store.splits(name)) for name in spec.datasets},
        )


@dataclass(frozen=True)
class JobFolderReport:
    """`data_version` is that of the JobFolder; `noise` is None for a job without noise."""

    folder: Path
    data_version: str
    files: list[str]
    noise: NoiseRatio | None = None

    @property
    def digest(self) -> str:
        return self.folder.name


def build_job_folder(
    spec: JobSpec, preset: ModelPreset, store: Store, inputs: JobInputs | None = None
) -> JobFolderReport:
    """Build the job folder of `spec` as a version in the store, and make it the current one.

    `inputs` default to the current versions. Raises FileNotFoundError naming what is missing, and SpecError for noise
    under which nothing can be learned.
    """
    inputs = inputs or JobInputs.current(spec, preset, store)
    plans = [_site_plan(spec, site, preset, store, inputs) for site in spec.sites]
    noise = noise_ratio(spec, archive_file(inputs.base_model))
    if noise:
        noise.require_less(spec.name)
    with adding(store.job_folder(spec.name)) as addition:
        folder = addition.folder
        exported = folder.with_name("exported")
        limits = round_limits(plans, spec.private_sites, store.home)
        # With adapters, only they are sent, so the server needs no base model.
        export_job(spec, None if spec.training.peft else plans[0].base_model, exported, limits, noise)
        (exported / spec.name).rename(folder)  # an empty folder
        for plan in plans:
            app = folder / f"app_{plan.site}"
            (app / _PLAN).write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / SPEC_FILE).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
        digests = {name: file_digest(folder / name) for name in _files(folder)}
        (folder / _MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    make_current(addition.version)
    version = JobFolder(addition.version, spec, tuple(plans))
    return JobFolderReport(version.path, version.data_version, _files(version.path), noise)


def verify_job_folder(job_folder: Path) -> None:
    """Raise JobFolderError if the folder was modified, or was built by another version of this package."""
    if folder_digest(job_folder) != job_folder.name:
        _name_change(job_folder)
    # Unparsed: another version's plans may have other fields.
    plan = json.loads(next(job_folder.glob(f"app_*/{_PLAN}")).read_text(encoding="utf-8"))
    if (built_with := plan.get("package")) != __version__:
        raise JobFolderError(
            f"{job_folder}: was built with fedsft-assets {built_with}, but {__version__} is installed; build it again"
        )


def _name_change(job_folder: Path) -> NoReturn:
    """Raise JobFolderError naming a file that has changed."""
    path = job_folder / _MANIFEST
    if not path.is_file():
        raise JobFolderError(f"{path} does not exist; build the job folder again")
    digests = json.loads(path.read_text(encoding="utf-8"))
    found = {name for name in _files(job_folder) if name != _MANIFEST}
    changed = [name for name, digest in digests.items() if name in found and file_digest(job_folder / name) != digest]
    for names, what in (
        (sorted(digests.keys() - found), "is missing"),
        (sorted(found - digests.keys()), "was added"),
        (changed, "has changed"),
    ):
        if names:
            raise JobFolderError(f"{job_folder / names[0]}: {what} since the job folder was built; build it again")
    raise JobFolderError(f"{path}: has changed since the job folder was built; build it again")


def _site_plan(spec: JobSpec, site: str, preset: ModelPreset, store: Store, inputs: JobInputs) -> SitePlan:
    own = spec.sites[site]
    # A private dataset has no version here; only the site has it, under this name.
    trained_on = store.splits(own.dataset) / "private" if own.private else inputs.datasets[own.dataset]
    files = {
        "training_file": split_file(trained_on, "training"),
        "validation_file": split_file(inputs.combined, "validation"),
        "base_model": archive_file(inputs.base_model),
    }
    missing = [
        path for field, path in files.items() if not path.is_file() and not (own.private and field == "training_file")
    ]
    if missing:
        raise FileNotFoundError(f"job {spec.name}, {site}: {missing[0]} does not exist; materialize its asset first")
    digested = ("validation_file",) if own.private else ("training_file", "validation_file")
    return SitePlan(
        package=__version__,
        job=spec.name,
        site=site,
        rounds=spec.rounds,
        local_epochs=spec.local_epochs,
        max_local_steps=spec.max_local_steps,
        max_evaluation_records=spec.max_evaluation_records,
        seed=spec.seed,
        training=preset.resolve(spec.training),
        algorithm=spec.algorithm,
        wire=spec.wire,
        filters=spec.filters,
        digests={field: file_digest(files[field]) for field in digested},
        **{field: path.relative_to(store.home) for field, path in files.items()},
    )


def round_limits(plans: Sequence[SitePlan], private: Collection[str], home: Path) -> RoundLimits:
    """The limits of what a site may report about a round, from the sites' plans and the study's data."""
    one = plans[0]
    validated = count_records(home / one.validation_file)
    return RoundLimits(
        work=one.work,
        precision=one.training.precision,
        max_length=one.training.max_length,
        validation_records=min(validated, one.max_evaluation_records or validated),
        records={
            plan.site: None if plan.site in private else count_records(home / plan.training_file) for plan in plans
        },
    )


def export_job(
    spec: JobSpec, base_model: Path | None, root: Path, limits: RoundLimits, noise: NoiseRatio | None = None
) -> None:
    """Write NVFlare's part of a job folder as `root/<job>`."""
    from nvflare.job_config.api import FedJob

    from fedsft_assets.federation.server.controller import FederatedSFT
    from fedsft_assets.federation.site.executor import InstalledTrainer

    min_sites = spec.min_sites or len(spec.sites)
    job = FedJob(name=spec.name, min_clients=min_sites)
    server = FederatedSFT(
        sites=list(spec.sites),
        num_rounds=spec.rounds,
        limits=limits.model_dump(),
        base_model=str(base_model) if base_model else None,
        min_sites=min_sites,
        site_timeout=spec.site_timeout,
        wire=spec.wire,
        algorithm=spec.algorithm.model_dump(),
        package=__version__,
        noise_ratio=noise.of_round if noise else None,
        max_update_ratio=spec.max_update_ratio,
    )
    job.to_server(server)
    interval = min(_MAX_REQUEST_INTERVAL, len(spec.sites) / _REQUESTS_PER_SECOND)
    job.to_server({"server": {"task_request_interval": interval}})
    for site in spec.sites:
        job.to(InstalledTrainer(), site, tasks=["*"])
    job.export_job(str(root))
    for app in (root / spec.name).glob("app_*"):  # participants run their installed package, and refuse code
        shutil.rmtree(app / "custom")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
