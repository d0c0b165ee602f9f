"""What leaves a site, and how it is clipped and blurred before."""

import math

import pytest
import torch

from fedsft_assets.federation.site.noise import NoiseStream
from fedsft_assets.federation.site.update_filters import ChangeFilter
from fedsft_assets.specs.job import FiltersSpec, PrivacySpec


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
    with pytest.raises(
        ValueError, match=r"filters.privacy: steps is not a floating-point tensor; add it to filters\.exclude"
    ):
        _private(clip=1.0, noise_multiplier=1.0).privatized({"steps": torch.ones(3, dtype=torch.int64)})


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("noise", "why"), [(1e-3, "in training; try a lower learning rate, or"), (1e9, "under noise of 2e")]
)
def test_change_that_cannot_be_clipped_is_not_sent(odd: float, noise: float, why: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^filters\.privacy: .* has non-finite values .* nothing was sent: it diverged {why}"
    ) as told:
        _private(clip=1.0, noise_multiplier=noise).privatized({"w": torch.ones(400), "v": torch.tensor([1.0, odd])})
    assert ("learning rate" in str(told.value)) == (noise < 1)


def test_what_is_sent_does_not_depend_on_how_a_tensor_lies_in_memory() -> None:
    across = torch.zeros(30, 70).t()
    sent = _private(clip=1.0, noise_multiplier=1.0).privatized({"w": across})["w"]
    assert sent.shape == (70, 30)
    assert sent.std().item() == pytest.approx(1.0, rel=0.2)


def test_norm_of_what_is_sent_before_the_noise_is_never_above_the_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseStream, "take", lambda _, count: torch.zeros(count, dtype=torch.int64))
    for scale in (0.3, 1.0, 1e10):
        changes = {name: change.double() for name, change in _changes(scale).items()}
        assert _norm(_private(clip=1.0, noise_multiplier=1e-9).privatized(changes)) <= 1.0
