"""The loss of each record: the same as that of the record alone, and together the loss of the split."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedsft_assets.data.records import Record, dump_records
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.record_losses import losses_of
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.local_training import mean_loss
from fedsft_assets.specs.plan import SitePlan


@pytest.fixture
def split(records: list[Record], tmp_path: Path) -> Path:
    path = tmp_path / "testing.jsonl"
    path.write_bytes(dump_records(records))
    return path


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize("answer_only", [True, False])
def test_losses_of_records_are_those_of_each_alone(
    model: LanguageModel,
    tokens: list[Tokens],
    split: Path,
    make_plan: Callable[..., SitePlan],
    packs: bool,
    plain_head: bool,
    answer_only: bool,
) -> None:
    training = make_plan(answer_only_loss=answer_only, micro_batch_size=3).training
    model.answer_loss.packs, model.answer_loss.plain_head = packs, plain_head
    found = losses_of(model, split, training)
    alone = [mean_loss(model, [one], training) for one in tokens]
    assert found.tokens.tolist() == [loss.tokens for loss in alone]
    np.testing.assert_allclose(found.losses, [loss.loss * loss.tokens for loss in alone], rtol=1e-4)
    whole = mean_loss(model, tokens, training)
    assert found.losses.sum() / found.tokens.sum() == pytest.approx(whole.loss, rel=1e-5)


def test_first_records_are_scored_alone_if_no_more_are_asked_for(
    model: LanguageModel, split: Path, make_plan: Callable[..., SitePlan]
) -> None:
    training = make_plan().training
    some, all_of_them = (losses_of(model, split, training, most) for most in (3, None))
    np.testing.assert_allclose(some.losses, all_of_them.losses[:3], rtol=1e-4)
    assert some.tokens.tolist() == all_of_them.tokens[:3].tolist()
