"""A Lightning trainer for one epoch on the CPU that writes and says nothing."""

from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(**more: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **more,
    )
