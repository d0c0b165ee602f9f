"""Starts a site's trainer as NVFlare does, and prints its CPU seconds from Python's start to the first batch.

NVFlare's own connection is left out: it needs a running job.
"""

import sys
from pathlib import Path

from benchmarks.training.watch import Watch


def start(plan_file: Path) -> float:
    """CPU seconds until the first batch of the plan's first round enters the model."""
    import nvflare.client  # noqa: F401 the trainer's process needs it before its first batch

    from fedsft_assets.federation.site.process import started_clock
    from fedsft_assets.federation.site.trainer import SiteTrainer
    from fedsft_assets.model.training.local_training import train_round
    from fedsft_assets.specs.plan import SitePlan

    watch = Watch()
    plan = SitePlan.model_validate_json(plan_file.read_text(encoding="utf-8"))
    trainer = SiteTrainer(plan.model_copy(update={"max_local_steps": 1}), started_clock(), lambda *_: None)
    train_round(trainer.model, trainer.training, trainer.plan, 0, devices=trainer.devices)
    return watch.start_cpu_seconds


if __name__ == "__main__":
    print(f"{start(Path(sys.argv[1])):.3f}")
