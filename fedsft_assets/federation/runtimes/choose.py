"""The choice of a runtime by its name."""

from collections.abc import Iterable
from pathlib import Path

from fedsft_assets.federation.runtimes.interface import Runtime
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.settings import Settings
from fedsft_assets.specs.dataset import load_datasets
from fedsft_assets.specs.job import load_jobs


def make_runtime(name: str, settings: Settings, folder: Path, threads_per_trainer: int) -> Runtime:
    """The runtime of that name for one execution; `folder` is for its own files.

    Trainers of a POC have as many threads as it gives them when it starts, those of a federation what their sites
    give them. Raises UnavailableError for a federation without a startup kit.
    """
    if name == "poc":
        from fedsft_assets.federation.runtimes.poc.runtime import Poc

        # For the sites of all jobs: a POC that one job's site starts alone would give it all cores.
        return Poc(poc_system(settings, sites_of_jobs(settings)), folder)
    if name == "production":
        from fedsft_assets.federation.runtimes.production import Production

        return Production(settings.production, folder)
    from fedsft_assets.federation.runtimes.simulator.runtime import Simulator

    return Simulator(folder, threads_per_trainer)


def poc_system(settings: Settings, sites: Iterable[str] = ()) -> PocSystem:
    """The POC of these settings' home."""
    return PocSystem(settings.home / "poc", settings.poc, settings.environment(), sites)


def sites_of_jobs(settings: Settings) -> list[str]:
    """The names of all sites in the job files. Raises SpecError for a file that is wrong."""
    jobs = load_jobs(settings.jobs, list(load_datasets(settings.datasets)))
    return sorted({site for job in jobs for site in job.sites})
