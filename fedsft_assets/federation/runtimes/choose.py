"""Creates a runtime by name."""

import os
from pathlib import Path

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.runtimes.interface import Runtime
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.process_env import home_environment
from fedsft_assets.specs.runtime import RuntimeSettings


def make_runtime(settings: RuntimeSettings, job: JobFolder, folder: Path) -> Runtime:
    """The runtime that `settings` names, for one execution of `job`; `folder` takes its files.

    The simulator's trainers share the job's `simulator_threads`, or all cores; a POC and the sites of a federation have
    settings of their own. Raises UnavailableError for a federation without a startup kit.
    """
    if settings.name == "poc":
        from fedsft_assets.federation.runtimes.poc.runtime import Poc

        return Poc(poc_system(job.home, settings), folder)
    if settings.name == "production":
        from fedsft_assets.federation.runtimes.production import Production

        return Production(settings.production, folder)
    from fedsft_assets.federation.runtimes.simulator.runtime import Simulator

    shared = job.plans[0].training.simulator_threads or os.cpu_count() or 1
    threads = settings.threads_per_trainer or max(1, shared // len(job.spec.sites))
    return Simulator(folder, threads, job.base_model)


def poc_system(home: Path, settings: RuntimeSettings) -> PocSystem:
    """The POC of the home `home`."""
    return PocSystem(home / "poc", settings.poc, home_environment(home), settings.sites)
