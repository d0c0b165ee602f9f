"""The endpoint of a process: NVFlare finds it within the block, and the one before it afterwards."""

import pytest
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import dots

from fedsft_assets.federation.transport.endpoint import TensorEndpoint
from fedsft_assets.federation.transport.install import StreamDecomposer, tensor_streams


def _installed() -> TensorEndpoint:
    decomposer = fobs.get_dot_handler(dots.TENSOR_DOWNLOAD)
    assert isinstance(decomposer, StreamDecomposer)
    return decomposer.endpoint


def test_endpoint_is_the_processs_within_the_block_and_the_previous_one_behind_it() -> None:
    outer, inner = TensorEndpoint(), TensorEndpoint()
    with tensor_streams(outer):
        with tensor_streams(inner):
            assert _installed() is inner
        assert _installed() is outer
    assert _installed() is not outer


def test_decomposer_of_nvflares_own_that_is_there_before_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    own = TensorDecomposer()
    monkeypatch.setattr(fobs, "get_dot_handler", lambda _dot: own)
    with (
        pytest.raises(RuntimeError, match=r"^NVFlare's TensorDecomposer is already registered"),
        tensor_streams(TensorEndpoint()),
    ):
        pass
