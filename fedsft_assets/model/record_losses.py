"""The loss of a model on each record: what everything that is said of a model's quality is computed from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsft_assets.specs.plan import ResolvedTraining

if TYPE_CHECKING:
    from fedsft_assets.model.language_model import LanguageModel


class RecordLosses(NamedTuple):
    """Answer tokens, int64 [N], and the sum of their losses in nats, float64 [N], of N records in their order."""

    tokens: npt.NDArray[np.int64]
    losses: npt.NDArray[np.float64]


def losses_of(
    model: LanguageModel, records_file: Path, training: ResolvedTraining, most: int | None = None
) -> RecordLosses:
    """Score the first `most` records of a JSONL split, each once, as the sites of a job do.

    Records are cut to the length of `training`. Where the precision is `auto`, it is fp32 on a CPU. Raises DataError
    for a split that cannot be read.
    """
    import torch

    from fedsft_assets.model.training.batches import evaluation_batches, micro_batches
    from fedsft_assets.model.training.devices.interface import OneDevice
    from fedsft_assets.model.training.local_training import split_tokens

    answer_only = training.answer_only_loss
    tokens = split_tokens(model, records_file, training.max_length, most)
    counts = np.array([one.targets(answer_only) for one in tokens], np.int64)
    losses = np.zeros(len(tokens))
    limits = (training.micro_batch_size, training.micro_batch_tokens, model.answer_loss.packs)
    device = OneDevice(model, training.precision)
    model.eval()
    with model.answer_loss.prepared(), torch.no_grad():
        for indices in evaluation_batches(tokens, training.batch_size):
            for part in micro_batches(tokens, indices, *limits):
                batch = model.answer_loss.batch([tokens[index] for index in part], answer_only)
                each = device.losses(batch.to(device.device)).double().cpu().numpy()
                losses[part] = [of_record.sum() for of_record in np.split(each, np.cumsum(counts[part])[:-1])]
    return RecordLosses(counts, losses)
