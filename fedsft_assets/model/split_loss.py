"""The loss of a `.nemo` archive on a split, computed in the calling process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedsft_assets.specs.plan import SitePlan

if TYPE_CHECKING:
    from fedsft_assets.model.training.local_training import Loss


def split_loss(archive: Path, records_file: Path, plan: SitePlan) -> Loss:
    """Load the archive and score a JSONL split as a site does by its `plan`: same number of records, same truncation.

    Precision `auto` is fp32 on any CPU, whatever the site's trial decided, so that scores are comparable.
    """
    from fedsft_assets.model.language_model import LanguageModel
    from fedsft_assets.model.training.local_training import mean_loss, split_tokens

    model = LanguageModel.load(archive)
    tokens = split_tokens(model, records_file, plan.training.max_length, plan.max_evaluation_records)
    return mean_loss(model, tokens, plan.training)
