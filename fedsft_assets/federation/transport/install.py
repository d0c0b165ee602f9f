"""How tensors travel between the server part of a job and its trainers: as one stream of bytes, cut into pieces.

NVFlare fetches tensors one by one, each packed into a file of its own in memory, and copies them at every step. Here
a piece is a view of the tensor's own memory where it can be, and all pieces are of the same modest size, so that
memory is used again instead of being asked for anew: on most machines that costs more than the copies themselves.
It needs torch and NVFlare only. Both ends must have it; NVFlare's processes between them forward bytes that they do
not look at.
"""

from typing import Any

import torch
from nvflare.app_opt.pt import tensor_downloader
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.streaming.download_service import Downloadable
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import dots

from fedsft_assets.federation.transport.header import send_pieces_of
from fedsft_assets.federation.transport.receiving import receiver
from fedsft_assets.federation.transport.sending import Sending
from fedsft_assets.memory import keep_message_memory

_OF_ALL_PEERS = 160 << 20  # bytes in pieces, one for each peer


def send_tensors_as_streams(peers: int = 1) -> None:
    """Have this process send and receive tensors in this way; to be called before NVFlare has one of its own.

    With many peers pieces are smaller, so that memory does not grow with their number; peers follow suit. Raises
    RuntimeError if NVFlare has a way of its own already.
    """
    send_pieces_of(_OF_ALL_PEERS // max(1, peers))
    fobs.register(StreamedTensors)
    found = type(fobs.get_dot_handler(dots.TENSOR_DOWNLOAD)).__name__
    if found != StreamedTensors.__name__:  # by name: a job folder may bring this module a second time
        raise RuntimeError(f"tensors are sent by NVFlare's {found} in this process, which the other end does not read")
    keep_message_memory()


class StreamedTensors(TensorDecomposer):
    """In place of NVFlare's decomposer of tensors."""

    def to_downloadable(self, items: dict[str, torch.Tensor], max_chunk_size: int, fobs_ctx: dict) -> Downloadable:  # noqa: ARG002
        return Sending(items)

    def download(self, from_fqcn: str, ref_id: str, *, fobs_ctx: Any = None, **settings: Any) -> Any:  # noqa: ARG002
        """Fetch the tensors of a message; returns an error, or None, and the tensors by NVFlare's names for them.

        Raises OSError where this machine has no room for them.
        """
        receiving = receiver()
        tensor_downloader.download_object(from_fqcn=from_fqcn, ref_id=ref_id, consumer=receiving, **settings)
        if receiving.fault:
            raise receiving.fault
        return receiving.error, receiving.tensors
