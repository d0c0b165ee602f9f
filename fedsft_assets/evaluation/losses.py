"""The loss of a `.nemo` archive on a split, in whatever process calls it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsft_assets.model.training import Loss


def split_loss(
    archive: Path, records_file: Path, max_length: int, batch_size: int, max_records: int | None = None
) -> Loss:
    """Load the archive and score the first `max_records` records of a JSONL split, cut to `max_length` tokens."""
    from fedsft_assets.data.records import read_records
    from fedsft_assets.model.batches import tokenize
    from fedsft_assets.model.sft_model import SFTModel
    from fedsft_assets.model.training import mean_loss

    model = SFTModel.load(archive)
    records = read_records(records_file)[:max_records]
    return mean_loss(model, tokenize(records, model.tokenizer, max_length, model.prompt_template), batch_size)
