"""The NVFlare job folder of a JobSpec: what NVFlare's own tools take, whole and by itself.

`meta.json`, `app_server/` and one `app_<site>/` for each site, with the site's `config/plan.json`, and
`job.json`, the JobSpec with all overrides. A site runs the package that is installed there, by the `python3`
on its path; the server finds the little that it runs inside the job folder, so it needs only NVFlare and torch.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fedsft_assets import __version__
from fedsft_assets.specs import COMBINED, JobSpec, ModelPreset, SitePlan
from fedsft_assets.store import Store, file_digest, folder_digest, publish_folder, split_file

SPEC_FILE = "job.json"
_MANIFEST = "manifest.json"  # the SHA-256 of every other file
_PLAN = "config/plan.json"
# So often sites ask for their next task, all together. NVFlare's own 2 s are felt in every round of a few.
_REQUESTS_PER_SECOND, _MOST_SECONDS_BETWEEN_REQUESTS = 20, 2.0


class JobFolderError(ValueError):
    """A job folder that is not as it was built."""


@dataclass(frozen=True)
class JobFolderReport:
    digest: str
    files: list[str]
    plans: list[SitePlan]


def build_job_folder(spec: JobSpec, preset: ModelPreset, store: Store) -> JobFolderReport:
    """Write the job folder of `spec` into the store, over an older one only when it is complete.

    Raises FileNotFoundError that names the missing split.
    """
    plans = [_site_plan(spec, site, preset, store) for site in spec.sites]
    target = store.job_folder(spec.name)
    with tempfile.TemporaryDirectory(dir=_parent(target)) as exported:
        # With adapters, no weights of the base model travel: the server needs none.
        export_job(spec, None if spec.training.peft else store.base_model(preset.name), Path(exported))
        with publish_folder(target) as folder:
            Path(exported, spec.name).rename(folder)
            for plan in plans:
                app = folder / f"app_{plan.site}"
                (app / _PLAN).write_text(plan.model_dump_json(indent=2) + "\n", encoding="utf-8")
            (folder / SPEC_FILE).write_text(spec.model_dump_json(indent=2) + "\n", encoding="utf-8")
            digests = {name: file_digest(folder / name) for name in _files(folder)}
            (folder / _MANIFEST).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    return JobFolderReport(folder_digest(target), _files(target), plans)


def verify_job_folder(job_folder: Path) -> None:
    """Raises JobFolderError if the folder is not as it was built."""
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


def read_spec(job_folder: Path) -> JobSpec:
    """The JobSpec that a job folder was built from."""
    return JobSpec.model_validate_json((job_folder / SPEC_FILE).read_text(encoding="utf-8"))


def read_plans(job_folder: Path) -> list[SitePlan]:
    """What each site is told, in the order of the JobSpec."""
    return [
        SitePlan.model_validate_json((job_folder / f"app_{site}" / _PLAN).read_text(encoding="utf-8"))
        for site in read_spec(job_folder).sites
    ]


def _site_plan(spec: JobSpec, site: str, preset: ModelPreset, store: Store) -> SitePlan:
    files = {
        "training_file": split_file(store.splits(spec.sites[site].dataset), "training"),
        "validation_file": split_file(store.splits(COMBINED), "validation"),
    }
    shared = {field: path for field, path in files.items() if field != "training_file" or not spec.sites[site].private}
    for path in shared.values():
        if not path.is_file():
            raise FileNotFoundError(f"job {spec.name}, {site}: {path} does not exist; materialize its asset first")
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
        base_model=store.base_model(preset.name),
        digests={field: file_digest(path) for field, path in shared.items()},
        **files,
    )


def export_job(spec: JobSpec, base_model: Path | None, root: Path) -> None:
    """Write the part of a job folder that NVFlare defines, as `root/<job>`."""
    from nvflare.job_config.api import FedJob

    from fedsft_assets.federation.installed_trainer import InstalledTrainer
    from fedsft_assets.federation.server import FederatedSFT

    min_sites = spec.min_sites or len(spec.sites)
    job = FedJob(name=spec.name, min_clients=min_sites)
    server = FederatedSFT(
        sites=list(spec.sites),
        num_rounds=spec.rounds,
        base_model=str(base_model) if base_model else None,
        min_sites=min_sites,
        site_timeout=spec.site_timeout,
        wire=spec.wire,
        algorithm=spec.algorithm.model_dump(),
    )
    job.to_server(server)
    interval = min(_MOST_SECONDS_BETWEEN_REQUESTS, len(spec.sites) / _REQUESTS_PER_SECOND)
    job.to_server({"server": {"task_request_interval": interval}})
    for site in spec.sites:
        job.to(InstalledTrainer(), site, tasks=["*"])
    job.export_job(str(root))
    for site in spec.sites:  # a site runs what is installed there, and may refuse jobs that bring code
        shutil.rmtree(root / spec.name / f"app_{site}" / "custom")


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _parent(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.parent
