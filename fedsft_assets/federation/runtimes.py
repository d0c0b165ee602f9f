"""The choice of a runtime by its name."""

from pathlib import Path

from fedsft_assets.federation.runtime import Runtime
from fedsft_assets.settings import Settings


def make_runtime(name: str, settings: Settings, folder: Path, threads_per_trainer: int) -> Runtime:
    """The runtime of that name for one execution; `folder` is for its own files."""
    if name == "poc":
        from fedsft_assets.federation.poc import PocRuntime

        return PocRuntime(settings)
    if name == "production":
        from fedsft_assets.federation.production import Production

        return Production(settings)
    from fedsft_assets.federation.simulator import Simulator

    return Simulator(folder, threads_per_trainer)
