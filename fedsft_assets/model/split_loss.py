"""The loss of a `.nemo` archive on a split, in whatever process calls it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedsft_assets.specs.plan import SitePlan

if TYPE_CHECKING:
    from fedsft_assets.model.training.local_training import Loss


def split_loss(archive: Path, records_file: Path, plan: SitePlan) -> Loss:
    """Load the archive and score a JSONL split as the sites of `plan` do: as many records, cut to the same length.

    Where their precision is `auto`, it is in fp32 on a CPU, whatever they have decided: scores compare.
    """
    from fedsft_assets.model.language_model import LanguageModel
    from fedsft_assets.model.training.local_training import mean_loss, split_tokens

    model = LanguageModel.load(archive)
    tokens = split_tokens(model, records_file, plan.training.max_length, plan.max_evaluation_records)
    return mean_loss(model, tokens, plan.training)
