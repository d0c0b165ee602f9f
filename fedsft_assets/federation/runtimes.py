"""The choice of a runtime by its name."""

from pathlib import Path

from fedsft_assets.federation.runtime import Runtime
from fedsft_assets.settings import Settings


def make_runtime(name: str, settings: Settings, folder: Path, threads_per_trainer: int) -> Runtime:
    """The runtime of that name for one execution; `folder` is for its own files.

    Trainers of a POC have as many threads as it gives them when it starts, those of a federation what their sites
    give them. Raises UnavailableError for a federation without a startup kit.
    """
    if name == "poc":
        from fedsft_assets.federation.poc import Poc, PocSystem

        return Poc(PocSystem(settings.home / "poc", settings.poc, settings.environment()), folder)
    if name == "production":
        from fedsft_assets.federation.production import Production

        return Production(settings.production, folder)
    from fedsft_assets.federation.simulator import Simulator

    return Simulator(folder, threads_per_trainer)
