"""Installs the tensor stream in NVFlare: tensors are sent as one byte stream, cut into pieces.

NVFlare fetches tensors one by one, each serialized to an in-memory file, and copies them at every step. Here a piece is
a view of the tensors' own memory if possible, and all pieces have the same moderate size, so that memory is reused: on
most machines, allocating memory costs more than copying. Requires torch and NVFlare only. Both ends must use it;
NVFlare's processes in between forward opaque bytes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from nvflare.app_opt.pt import tensor_downloader
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.streaming.download_service import Downloadable
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import dots

from fedsft_assets.federation.transport.endpoint import TensorEndpoint
from fedsft_assets.federation.transport.receiving import TransferError, consumer_for
from fedsft_assets.federation.transport.sending import TensorStream


@contextmanager
def tensor_streams(endpoint: TensorEndpoint) -> Iterator[None]:
    """Send and receive this process's tensors as streams within the block, as configured by the endpoint.

    NVFlare has one tensor decomposer per process, which holds the endpoint; after the block, the previous endpoint is
    restored. Raises RuntimeError if NVFlare's own tensor decomposer is already registered.
    """
    fobs.register(StreamDecomposer)
    decomposer = fobs.get_dot_handler(dots.TENSOR_DOWNLOAD)
    if not isinstance(decomposer, StreamDecomposer):
        raise RuntimeError(
            f"NVFlare's {type(decomposer).__name__} is already registered, and its format is not readable by the other"
            " end: enter tensor_streams before anything registers it"
        )
    previous, decomposer.endpoint = decomposer.endpoint, endpoint
    try:
        yield
    finally:
        decomposer.endpoint = previous


class StreamDecomposer(TensorDecomposer):
    """Replaces NVFlare's `TensorDecomposer` to send and receive tensors as streams."""

    def __init__(self, endpoint: TensorEndpoint | None = None) -> None:
        super().__init__()
        self.endpoint = endpoint or TensorEndpoint()

    def to_downloadable(self, items: dict[str, torch.Tensor], max_chunk_size: int, fobs_ctx: dict) -> Downloadable:  # noqa: ARG002
        return TensorStream(items, self.endpoint.piece_size)

    def download(self, from_fqcn: str, ref_id: str, *, fobs_ctx: Any = None, **settings: Any) -> Any:  # noqa: ARG002
        """Fetch the tensors of a message; returns an error or None, and the tensors by NVFlare's keys.

        Raises OSError if this machine is out of space, and TransferError if the sender is gone.
        """
        consumer = consumer_for(self.endpoint)
        tensor_downloader.download_object(from_fqcn=from_fqcn, ref_id=ref_id, consumer=consumer, **settings)
        if consumer.local_error:
            raise consumer.local_error
        if consumer.transfer_failed:
            raise TransferError(str(consumer.error))
        return consumer.error, consumer.tensors
