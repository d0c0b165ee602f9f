"""The token-weighted average, against numpy in float64, and what small changes lose on their way."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.app_opt.pt.lazy_tensor_dict import _LazyRef, _TempDirRef
from safetensors.torch import save_file

from fedsft_assets.federation.protocol.messages import Wire
from fedsft_assets.federation.server.aggregation import TokenWeightedAverage
from fedsft_assets.federation.transport import rounded

Weights = dict[str, torch.Tensor]
TOKENS = {"site-1": 17, "site-2": 100_003, "site-3": 4_321}


def _weights(seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": (torch.randn(50, 8, generator=generator) * 100).to(dtype),
        "layer.weight": torch.randn(8, 8, generator=generator).to(dtype),
        "layer.scale": torch.randn((), generator=generator).to(dtype),
    }


def _average(sites: Mapping[str, Mapping[str, Any]], tokens: Mapping[str, int] | None = None) -> Weights:
    average = TokenWeightedAverage()
    for site, tensors in sites.items():
        average.add(site, tensors, (tokens or TOKENS)[site])
    return dict(average.tensors())


def _by_numpy(tensors: list[torch.Tensor], tokens: list[int]) -> np.ndarray:
    return np.average([tensor.to(torch.float64).numpy() for tensor in tensors], axis=0, weights=tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_weighted_by_tokens_as_numpy_has_it_in_float64(dtype: torch.dtype) -> None:
    sites = {site: _weights(seed, dtype) for seed, site in enumerate(TOKENS)}
    averaged = _average(sites)
    assert averaged.keys() == sites["site-1"].keys()
    for name, value in averaged.items():
        expected = _by_numpy([weights[name] for weights in sites.values()], list(TOKENS.values()))
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), expected.astype(np.float32), rtol=2e-7, atol=0)


def test_tensor_that_is_summed_in_several_pieces_is_averaged_whole() -> None:
    sites = {site: {"w": torch.randn(1031, 2053)} for site in TOKENS}  # twice what is summed at a time, and some
    expected = _by_numpy([weights["w"] for weights in sites.values()], list(TOKENS.values()))
    np.testing.assert_allclose(_average(sites)["w"].numpy(), expected.astype(np.float32), rtol=2e-7, atol=0)


def test_average_does_not_depend_on_the_order_of_arrival() -> None:
    sites = {site: _weights(seed) for seed, site in enumerate(TOKENS)}
    averages = [_average({site: sites[site] for site in order}) for order in itertools.permutations(sites)]
    for other in averages[1:]:
        for name, value in averages[0].items():
            assert torch.equal(value, other[name])


def test_site_of_its_own_gets_back_what_it_sent() -> None:
    weights = _weights(1)
    for name, value in _average({"site-1": weights}, {"site-1": 12_345}).items():
        assert torch.equal(value, weights[name])


def test_small_updates_of_large_weights_are_not_lost() -> None:
    """In float32, a sum weighted by many tokens would round them away."""
    base = torch.full((4,), 1000.0)
    step = torch.tensor([0.0, 1e-4, 1.2e-4, 2e-4])
    tokens = {f"site-{k}": 10_000_019 + k for k in range(3)}
    assert torch.equal(_average({site: {"w": base + step} for site in tokens}, tokens)["w"], base + step)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("wire", "most"), [(Wire.FP32, 1e-6), (Wire.BF16_DIFF, 1e-2)])
def test_averaged_change_is_that_of_float64_within_what_its_wire_allows(size: float, wire: Wire, most: float) -> None:
    """Changes as sites send them: of weights of size 1, and so much smaller."""
    generator = torch.Generator().manual_seed(3)
    changes = {site: torch.randn(64, 64, generator=generator) * size for site in TOKENS}
    averaged = _average({site: {"w": rounded(change, wire)} for site, change in changes.items()})
    expected = _by_numpy(list(changes.values()), list(TOKENS.values()))
    travelled = rounded(averaged["w"], wire).to(torch.float64).numpy()
    assert np.linalg.norm(travelled - expected) / np.linalg.norm(expected) <= most


def test_change_is_rounded_for_its_wire_and_integers_never() -> None:
    change = torch.tensor([1.0, 1.001, -3.14159])
    assert torch.equal(rounded(change, Wire.FP32), change)
    assert rounded(change, Wire.BF16_DIFF).dtype == torch.bfloat16
    assert torch.equal(rounded(change, Wire.BF16_DIFF), torch.tensor([1.0, 1.0, -3.140625], dtype=torch.bfloat16))
    counts = torch.tensor([16_777_217, -3])
    assert torch.equal(rounded(counts, Wire.BF16_DIFF), counts)


def test_integers_are_averaged_too() -> None:
    averaged = _average(
        {"site-1": {"n": torch.tensor([10, -4])}, "site-2": {"n": torch.tensor([20, 4])}}, {"site-1": 3, "site-2": 1}
    )
    assert torch.equal(averaged["n"], torch.tensor([12.5, -2.0]))


def _on_the_disk(weights: Weights, folder: Path) -> dict[str, _LazyRef]:
    """As NVFlare hands over what it keeps on the disk; the folder is gone with the last reference."""
    folder.mkdir()
    save_file(weights, folder / "part.safetensors")
    held = _TempDirRef(str(folder))
    return {name: _LazyRef(str(folder / "part.safetensors"), name, held) for name in weights}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_on_the_disk_are_averaged_as_those_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    sites = {site: _weights(seed, dtype) for seed, site in enumerate(TOKENS)}
    average = TokenWeightedAverage({name: tuple(tensor.shape) for name, tensor in sites["site-1"].items()})
    for site, weights in sites.items():
        average.add(site, _on_the_disk(weights, tmp_path / site), TOKENS[site])
    averaged = dict(average.tensors())
    for name, value in _average(sites).items():
        assert torch.equal(averaged[name], value)


def test_files_of_the_tensors_are_gone_after_the_average(tmp_path: Path) -> None:
    average = TokenWeightedAverage()
    for site, tokens in TOKENS.items():
        average.add(site, _on_the_disk(_weights(1), tmp_path / site), tokens)
    assert len(list(tmp_path.iterdir())) == 3
    assert len(dict(average.tensors())) == 3
    assert list(tmp_path.iterdir()) == []
    assert average.sites == []


def test_tensor_on_the_disk_of_another_shape_is_named_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(_self: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(_LazyRef, "materialize", read)
    average = TokenWeightedAverage({"w": (2, 3)})
    average.add("site-1", _on_the_disk({"w": torch.ones(2, 3)}, tmp_path / "1"), 5)
    with pytest.raises(ValueError, match=r"site-2: tensors differ from those of the global model: w$"):
        average.add("site-2", _on_the_disk({"w": torch.ones(3, 2)}, tmp_path / "2"), 5)


def test_tensor_that_a_site_leaves_out_counts_as_no_change() -> None:
    average = TokenWeightedAverage({"a": (2,), "b": (2,), "c": (2,)})
    average.add("site-1", {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0, 8.0])}, 1, whole=False)
    average.add("site-2", {"b": torch.tensor([4.0, 0.0])}, 3, whole=False)
    averaged = dict(average.tensors())
    assert averaged.keys() == {"a", "b"}
    assert torch.equal(averaged["a"], torch.tensor([0.25, 0.5]))
    assert torch.equal(averaged["b"], torch.tensor([4.0, 2.0]))


@pytest.mark.parametrize("tokens", [None, 0, -3, 2.5, "12"])
def test_result_without_a_number_of_tokens_is_an_error_that_names_the_site(tokens: object) -> None:
    average = TokenWeightedAverage()
    with pytest.raises(
        ValueError, match=f"site-2: expected the number of answer tokens it trained on, found {tokens!r}"
    ):
        average.add("site-2", _weights(1), tokens)
    assert average.sites == []


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"layer.weight": torch.ones(8, 8)}, r"embedding, layer\.scale"),
        ({**_weights(2), "extra": torch.ones(1)}, "extra"),
        ({**_weights(2), "layer.weight": torch.ones(1, 8)}, r"layer\.weight"),
    ],
    ids=["fewer", "more", "another shape"],
)
@pytest.mark.parametrize("known", [True, False], ids=["global model", "first result"])
def test_tensors_that_are_not_the_models_are_an_error_that_names_site_and_tensors(
    odd: Weights, said: str, known: bool
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in _weights(1).items()}
    average = TokenWeightedAverage(shapes if known else None)
    average.add("site-1", _weights(1), 5)
    with pytest.raises(ValueError, match=f"site-2: tensors differ from those of the global model: {said}$"):
        average.add("site-2", odd, 5)
    assert average.sites == ["site-1"]


@pytest.mark.parametrize("odd", [{"extra": torch.ones(1)}, {"layer.scale": torch.ones(1)}], ids=["name", "shape"])
def test_tensor_of_a_part_of_the_model_must_be_the_models_too(odd: Weights) -> None:
    average = TokenWeightedAverage({name: tuple(tensor.shape) for name, tensor in _weights(1).items()})
    with pytest.raises(ValueError, match=f"site-2: tensors differ .*: {next(iter(odd))}$"):
        average.add("site-2", odd, 5, whole=False)


def test_many_odd_tensors_are_not_all_named() -> None:
    average = TokenWeightedAverage({"w": (1,)})
    with pytest.raises(ValueError, match=r"model: t0, t1, t2, t3, t4$"):
        average.add("site-1", {"w": torch.ones(1), **{f"t{k}": torch.ones(1) for k in range(9)}}, 5)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_number_that_is_not_finite_is_an_error_that_names_site_and_tensor(odd: float, dtype: torch.dtype) -> None:
    sites = {site: _weights(seed, dtype) for seed, site in enumerate(TOKENS)}
    sites["site-2"]["layer.weight"][3, 4] = odd
    with pytest.raises(ValueError, match=r"^site-2: layer\.weight has non-finite values$"):
        _average(sites)


def test_all_sites_with_numbers_that_are_not_finite_are_named() -> None:
    odd = {"w": torch.tensor([float("nan")])}
    with pytest.raises(ValueError, match=r"^site-1, site-3: w has"):
        _average({"site-3": odd, "site-2": {"w": torch.ones(1)}, "site-1": odd})


def test_tensors_are_read_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that nothing of the size of the model is held."""
    read: list[str] = []
    real = _LazyRef.materialize
    monkeypatch.setattr(_LazyRef, "materialize", lambda ref: (read.append(ref.key), real(ref))[1])
    average = TokenWeightedAverage()
    for site in ("site-1", "site-2"):
        average.add(site, _on_the_disk(_weights(1), tmp_path / site), 5)
    assert read == []
    for count, (name, _) in enumerate(average.tensors(), start=1):
        assert len(read) == 2 * count
        assert read[-2:] == [name, name]
