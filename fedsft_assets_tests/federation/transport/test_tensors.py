"""Tensors that say how they are to be sent: tensors in every other respect, and plain ones on the wire."""

from typing import Any

import pytest
import torch
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import FOBSContextKey
from nvflare.fuel.utils.fobs.datum import DatumManager

from fedsft_assets.federation.transport.endpoint import TensorEndpoint
from fedsft_assets.federation.transport.install import tensor_streams
from fedsft_assets.federation.transport.tensors import ContiguousTensors, Delta, LazyTensor
from fedsft_assets_tests.federation.lazy import materialize


def _lazy() -> torch.Tensor:
    return LazyTensor((2, 3), torch.float32, lambda first, last: torch.arange(first, last, dtype=torch.float32))


def _delta() -> torch.Tensor:
    return Delta(torch.ones(4), "weight", 7)


def _in_block() -> torch.Tensor:
    block = torch.arange(8.0)
    return ContiguousTensors({"a": block[:4], "b": block[4:]})["b"]


class _Cell:
    def get_fqcn(self) -> str:
        return "server"


@pytest.mark.parametrize("make", [_lazy, _delta, _in_block])
def test_nvflare_writes_each_as_a_plain_tensor(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = DatumManager(fobs_ctx={FOBSContextKey.CELL: _Cell()})
    monkeypatch.setattr(manager, "post_process", lambda: None)  # that offers the tensors to a network
    with tensor_streams(TensorEndpoint()):
        found = fobs.serialize({"one": make(), "plain": torch.ones(2)}, manager)
    assert found.count(b"torch.Tensor") == 2
    assert b"fedsft_assets.federation.transport.tensors" not in found


@pytest.mark.parametrize("make", [_delta, _in_block])
def test_what_is_computed_of_one_is_a_plain_tensor(make: Any) -> None:
    for result in (make() + 1, make().to(torch.bfloat16), make().clone(), torch.zeros(4).add_(make())):
        assert type(result) is torch.Tensor


def test_lazy_tensor_takes_no_memory_until_it_is_materialized() -> None:
    lazy = _lazy()
    assert (lazy.is_meta, lazy.shape, lazy.dtype) == (True, (2, 3), torch.float32)
    assert torch.equal(materialize(lazy), torch.arange(6.0).reshape(2, 3))
    plain = torch.ones(2)
    assert materialize(plain) is plain


def test_contiguous_tensors_are_a_mapping_of_tensors_at_the_addresses_that_they_had() -> None:
    given = {"a": torch.arange(4.0), "none": torch.empty(0, 2)}
    tensors = ContiguousTensors(given)
    assert list(tensors) == ["a", "none"]
    assert tensors["a"].data_ptr() == given["a"].data_ptr()
    assert tensors["none"].shape == (0, 2)
    assert dict(ContiguousTensors({})) == {}
