"""How far sites may differ that score the same model on the same records, by what they compute in."""

import pytest

from fedsft_assets.federation.protocol.site_messages import PointMessage
from fedsft_assets.federation.server.cross_checks import differing_scores
from fedsft_assets.specs.job import Precision


def _scores(*losses: float) -> dict[str, PointMessage]:
    return {
        f"site-{number}": PointMessage(name="val_loss", value=loss, round=1, samples=8, tokens=40, time=1.0)
        for number, loss in enumerate(losses, start=1)
    }


@pytest.mark.parametrize("precision", ["auto", "bf16-mixed", "16-mixed"])
def test_sites_agree_of_which_one_may_have_decided_for_16_bits(precision: Precision) -> None:
    assert differing_scores(_scores(4.0, 4.0, 4.03), precision) == {}
    assert list(differing_scores(_scores(4.0, 4.0, 4.05), precision)) == ["site-3"]


def test_sites_that_all_compute_in_fp32_agree_closely() -> None:
    assert differing_scores(_scores(4.0, 4.0, 4.0003), "32") == {}
    assert list(differing_scores(_scores(4.0, 4.0, 4.03), "32")) == ["site-3"]
