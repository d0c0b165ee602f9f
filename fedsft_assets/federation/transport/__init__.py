"""The tensor stream: transport of models between a server and its sites. Import it from here."""

from fedsft_assets.federation.transport.buffers import StoredTensor, temporary_files
from fedsft_assets.federation.transport.endpoint import TensorEndpoint, piece_size_for
from fedsft_assets.federation.transport.header import MAX_GAP
from fedsft_assets.federation.transport.install import tensor_streams
from fedsft_assets.federation.transport.receiving import BrokenTensor, TransferError
from fedsft_assets.federation.transport.tensors import ContiguousTensors, Delta, LazyTensor
from fedsft_assets.federation.transport.wire import rounded

__all__ = [
    "MAX_GAP",
    "BrokenTensor",
    "ContiguousTensors",
    "Delta",
    "LazyTensor",
    "StoredTensor",
    "TensorEndpoint",
    "TransferError",
    "piece_size_for",
    "rounded",
    "temporary_files",
    "tensor_streams",
]
