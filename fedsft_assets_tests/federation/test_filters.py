"""What leaves a site, and how it is clipped and blurred before."""

import math

import pytest
import torch

from fedsft_assets.federation.filters import ChangeFilter
from fedsft_assets.specs import FiltersSpec, PrivacySpec


def _changes(scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "wte.weight": torch.randn(400, 50, generator=generator) * scale,
        "h.0.bias": torch.randn(50, generator=generator) * scale,
    }


def _norm(changes: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(change.square().sum().item() for change in changes.values()))


def _private(clip: float, noise_multiplier: float) -> ChangeFilter:
    return ChangeFilter(FiltersSpec(privacy=PrivacySpec(clip=clip, noise_multiplier=noise_multiplier)))


def test_tensors_whose_names_match_a_pattern_stay_at_the_site() -> None:
    chosen = ChangeFilter(FiltersSpec(exclude=["^wte", r"\.bias$"]))
    assert not chosen.keeps("wte.weight")
    assert not chosen.keeps("h.0.bias")
    assert chosen.keeps("h.0.wte.weight")


def test_without_filters_changes_stay_as_they_are() -> None:
    chosen = ChangeFilter(FiltersSpec())
    assert not chosen.needs_all
    changes = _changes()
    after = chosen.privatized({name: change.clone() for name, change in changes.items()})
    assert all(torch.equal(after[name], change) for name, change in changes.items())


def test_change_is_clipped_as_one_vector() -> None:
    before = _changes(scale=10.0)
    after = _private(clip=2.0, noise_multiplier=1e-9).privatized(_changes(scale=10.0))
    assert _norm(after) == pytest.approx(2.0, rel=1e-4)
    share = 2.0 / _norm(before)
    for name, change in before.items():
        torch.testing.assert_close(after[name], change * share, rtol=1e-4, atol=1e-6)


def test_small_change_is_not_made_larger() -> None:
    before = _changes(scale=1e-4)
    after = _private(clip=2.0, noise_multiplier=1e-9).privatized(_changes(scale=1e-4))
    for name, change in before.items():
        torch.testing.assert_close(after[name], change, rtol=0, atol=1e-7)


def test_noise_has_the_standard_deviation_that_the_spec_says_and_is_never_the_same() -> None:
    one, other = (
        _private(clip=0.5, noise_multiplier=3.0).privatized({"w": torch.zeros(200_000)})["w"] for _ in range(2)
    )
    assert one.std().item() == pytest.approx(1.5, rel=0.02)
    assert one.mean().item() == pytest.approx(0.0, abs=0.02)
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1].item()) < 0.02


def test_tensor_that_is_not_of_floats_cannot_be_made_private() -> None:
    with pytest.raises(ValueError, match=r"filters.privacy: steps is not of floats; name it in filters\.exclude"):
        _private(clip=1.0, noise_multiplier=1.0).privatized({"steps": torch.ones(3, dtype=torch.int64)})
