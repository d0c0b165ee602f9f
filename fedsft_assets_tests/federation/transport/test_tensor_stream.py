"""Tensors as a stream of pieces: what arrives is what was sent, in memory, on the disk, and added to what is there."""

import errno
import gc
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.app_opt.pt import tensor_downloader
from nvflare.fuel.f3.streaming.download_service import ProduceRC

from fedsft_assets.federation.protocol.messages import KIND_KEY, VERSION, VERSION_KEY, Kind, Wire
from fedsft_assets.federation.server.state import ServerState
from fedsft_assets.federation.site.global_model import ExchangeError, SiteExchange
from fedsft_assets.federation.site.update_filters import ChangeFilter
from fedsft_assets.federation.transport import header, receiving
from fedsft_assets.federation.transport.buffers import StoredTensor, temporary_files
from fedsft_assets.federation.transport.endpoint import TensorEndpoint, piece_size_for
from fedsft_assets.federation.transport.install import StreamDecomposer
from fedsft_assets.federation.transport.receiving import BrokenTensor, TransferError
from fedsft_assets.federation.transport.sending import TensorStream
from fedsft_assets.federation.transport.tensors import ContiguousTensors, Delta, LazyTensor
from fedsft_assets.federation.transport.wire import rounded
from fedsft_assets.specs.job import FiltersSpec
from fedsft_assets_tests.federation.lazy import materialize

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """NVFlare's fetching of one piece after the other, without a network; the pieces that went over it."""
    seen: list[Any] = []

    def fetch(from_fqcn: Any, ref_id: str, consumer: Any, **_: Any) -> None:
        state = None
        while True:
            status, data, following = from_fqcn.produce(state, "the receiver")
            if status == ProduceRC.EOF:
                return consumer.download_completed(ref_id)
            seen.extend(data)
            arrived = [bytes(piece) for piece in data]
            state = consumer.consume(ref_id, following, arrived)
            if len(seen) == fetch.most:  # type: ignore[attr-defined]
                return consumer.download_failed(ref_id, "the server is gone")

    fetch.most = None  # type: ignore[attr-defined]
    monkeypatch.setattr(tensor_downloader, "download_object", fetch)
    seen.append(fetch)
    return seen


def _sent(tensors: Tensors, receiver: TensorEndpoint | None = None, piece_size: int = 64) -> tuple[str | None, Any]:
    stream = StreamDecomposer(TensorEndpoint(piece_size)).to_downloadable(tensors, 1, {})
    return StreamDecomposer(receiver or TensorEndpoint()).download(stream, "ref")


def _tensors() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {
        "T0": torch.randn(50, 8, generator=generator),
        "T1": torch.randn(7, generator=generator).to(torch.bfloat16),
        "T2": torch.tensor(3.5),
        "T3": torch.tensor([16_777_217, -3]),
        "T4": torch.empty(0, 3),
        "T5": torch.randn(8, 6, generator=generator).T,
        "T6": torch.tensor([True, False, True]),
        "T7": torch.randn(33, 3, generator=generator).to(torch.bfloat16),
    }


def _header(shape: Any = (20,), dtype: str = "torch.float32", gap: int = 0, tensors: int = 1) -> bytes:
    return json.dumps({"piece": 64, "tensors": [["T0", dtype, shape, None, gap]] * tensors}).encode()


def _same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.mark.usefixtures("pieces")
def test_tensors_of_all_kinds_arrive_as_they_were_sent() -> None:
    error, arrived = _sent(_tensors())
    assert error is None
    assert _same(arrived, _tensors())


def test_no_piece_is_larger_than_one_is_to_be_and_large_tensors_are_not_copied(pieces: list[Any]) -> None:
    tensors = _tensors()
    _sent(tensors)
    _, _contents, *sent = pieces
    assert max(map(len, sent)) == 64
    assert sum(map(len, sent)) == sum(tensor.nbytes for tensor in tensors.values())
    tensors["T0"].fill_(7.0)
    assert bytes(sent[0]) == torch.full((16,), 7.0).numpy().tobytes()


@pytest.mark.usefixtures("pieces")
def test_tensors_on_the_disk_are_those_that_were_sent_and_gone_with_the_block(tmp_path: Path) -> None:
    with temporary_files(tmp_path / "results") as files:
        _, arrived = _sent(_tensors(), TensorEndpoint(files=files))
        stored = {name: arrived.make_lazy_ref(name) for name in arrived}
        assert all(isinstance(tensor, StoredTensor) for tensor in stored.values())
        assert stored["T0"].shape == (50, 8)
        assert _same({name: tensor.materialize() for name, tensor in stored.items()}, _tensors())
        assert len(list((tmp_path / "results").iterdir())) == 1
    assert not (tmp_path / "results").exists()


def test_a_disk_without_room_is_this_machines_fault_whatever_nvflare_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(from_fqcn: Any, ref_id: str, consumer: Any, **_: Any) -> None:
        state = None
        try:
            while True:
                status, data, following = from_fqcn.produce(state, "the receiver")
                if status == ProduceRC.EOF:
                    return
                state = consumer.consume(ref_id, following, [bytes(piece) for piece in data])
        except OSError as error:  # NVFlare tells the consumer alone, who is to blame the peer
            consumer.download_failed(ref_id, f"receiver failed: {error}")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_downloader, "download_object", fetch)
    monkeypatch.setattr(receiving.FileConsumer, "take", full)
    with (
        temporary_files(tmp_path / "results") as files,
        pytest.raises(OSError, match="No space left on device"),
    ):
        _sent(_tensors(), TensorEndpoint(files=files))


@pytest.mark.usefixtures("pieces")
def test_file_is_written_over_when_nobody_has_a_tensor_of_it(tmp_path: Path) -> None:
    changed = {name: tensor + tensor for name, tensor in _tensors().items()}
    with temporary_files(tmp_path / "results") as files:
        receiver = TensorEndpoint(files=files)
        _, first = _sent(_tensors(), receiver)
        kept = first["T0"].materialize()
        del first
        _, second = _sent(changed, receiver)
        assert torch.equal(kept, _tensors()["T0"])
        assert len(list((tmp_path / "results").iterdir())) == 2
        del kept
        _, third = _sent(_tensors(), receiver)
        assert _same({name: tensor.materialize() for name, tensor in third.items()}, _tensors())
        assert _same({name: tensor.materialize() for name, tensor in second.items()}, changed)
        assert len(list((tmp_path / "results").iterdir())) == 2


@pytest.mark.usefixtures("pieces")
def test_memory_is_used_again_when_nobody_has_a_tensor_in_it() -> None:
    receiver = TensorEndpoint()
    _, first = _sent(_tensors(), receiver)
    kept, address = first.pop("T7"), first["T0"].data_ptr()
    del first
    _, second = _sent({"T0": torch.zeros(50, 8)}, receiver)
    assert second["T0"].data_ptr() != address
    assert torch.equal(kept, _tensors()["T7"])
    address = second["T0"].data_ptr()
    del second
    _, third = _sent({"T0": torch.ones(40, 8)}, receiver)
    assert third["T0"].data_ptr() == address
    assert torch.equal(third["T0"], torch.ones(40, 8))


def test_what_cannot_be_taken_is_no_failure_of_the_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    def consumed(ref_id: str, consumer: Any, **_: Any) -> None:
        def no_room(_: object) -> None:
            raise MemoryError

        consumer.begin = no_room
        try:
            consumer.consume(ref_id, {}, [_header()])
        except Exception as error:  # as NVFlare does
            consumer.download_failed(ref_id, f"exception when consuming data: {error}")

    monkeypatch.setattr(tensor_downloader, "download_object", consumed)
    error, _ = _sent(_tensors())
    assert error is not None
    assert error.startswith("exception when consuming data: ")


def test_what_arrived_in_part_is_an_error_and_its_file_is_used_again(tmp_path: Path, pieces: list[Any]) -> None:
    pieces[0].most = 5
    with temporary_files(tmp_path / "results") as files:
        receiver = TensorEndpoint(files=files)
        with pytest.raises(TransferError, match=r"^the server is gone$"):
            _sent(_tensors(), receiver)
        pieces[0].most = None
        error, arrived = _sent(_tensors(), receiver)
        assert error is None
        assert _same({name: tensor.materialize() for name, tensor in arrived.items()}, _tensors())
        assert len(list((tmp_path / "results").iterdir())) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no JSON", "the header of its stream is invalid (1 validation error for _WireHeader Invalid JSON"),
        (b"{}", "the header of its stream is invalid (2 validation errors for _WireHeader piece Field required"),
        (_header(shape=[-1]), "the header of its stream is invalid (1 validation error"),
        (_header(shape=[2.5]), "the header of its stream is invalid (1 validation error"),
        (_header(gap=-8), "the header of its stream is invalid (1 validation error"),
        (_header(dtype="torch.load"), "the header of its stream is invalid ('torch.load' is not a dtype)"),
        (_header(tensors=2), "the header of its stream is invalid (a tensor is listed twice)"),
        (_header(shape=[10**9]), "its stream has 4,000,000,000 bytes, expected at most 4,096"),
        (_header(shape=[1]), "its stream is longer than its header says"),
        (_header(shape=[900]), "its stream ended early"),
    ],
)
def test_stream_that_lies_leaves_what_stands_for_its_tensors_and_takes_no_more_room_than_the_model(
    tmp_path: Path, pieces: list[Any], monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    """An error would end the server's process, and with it the job, without a word of who it was."""
    monkeypatch.setattr(header.StreamHeader, "to_bytes", lambda _: content)
    with temporary_files(tmp_path / "results", max_bytes=4096) as files:
        error, tensors = _sent({"T0": torch.ones(20)}, TensorEndpoint(files=files))
        assert error is None
        assert "T0" in tensors
        assert tensors.make_lazy_ref("T0").reason.startswith(reason)
        assert sum(path.stat().st_size for path in (tmp_path / "results").iterdir()) <= 80
    assert len(pieces) > 1


@pytest.mark.usefixtures("pieces")
def test_tensor_that_is_not_in_a_stream_is_one_that_did_not_come(tmp_path: Path) -> None:
    with temporary_files(tmp_path / "results") as files:
        _, tensors = _sent({"T0": torch.ones(20)}, TensorEndpoint(files=files))
        assert isinstance(tensors.make_lazy_ref("T0"), StoredTensor)
        assert tensors.make_lazy_ref("T9") == BrokenTensor("missing from the stream")


@pytest.mark.usefixtures("pieces")
def test_tensor_that_is_made_when_it_is_sent_is_made_in_pieces() -> None:
    asked: list[tuple[int, int]] = []
    numbers = torch.arange(100, dtype=torch.float32)

    def make(first: int, last: int) -> torch.Tensor:
        asked.append((first, last))
        return numbers[first:last] * 2

    tensor = LazyTensor((25, 4), torch.float32, make)
    assert asked == []
    assert torch.equal(materialize(tensor), (numbers * 2).reshape(25, 4))
    asked.clear()
    _, arrived = _sent({"T0": torch.ones(3), "T1": tensor})
    assert torch.equal(arrived["T1"], (numbers * 2).reshape(25, 4))
    assert max(last - first for first, last in asked) <= 16


def _address(piece: memoryview) -> int:
    return int(np.frombuffer(piece, dtype=np.uint8).ctypes.data)


@pytest.fixture
def weights(tmp_path: Path) -> ContiguousTensors:
    return _written(tmp_path)


def _written(tmp_path: Path) -> ContiguousTensors:
    """Tensors that lie in a file, with what torch writes between them."""
    return ServerState(tmp_path / "state").write_weights(1, _tensors(), _tensors().__getitem__)


@pytest.mark.parametrize("on_disk", [False, True])
def test_tensors_of_a_file_are_sent_as_they_lie_there(
    weights: ContiguousTensors, tmp_path: Path, pieces: list[Any], on_disk: bool
) -> None:
    sent = {"A": torch.ones(5), **weights, "Z": torch.arange(3)}
    with temporary_files(tmp_path / "results") if on_disk else nullcontext() as files:
        error, arrived = _sent(sent, TensorEndpoint(files=files))
        assert error is None
        found = {name: tensor.materialize() for name, tensor in arrived.items()} if on_disk else arrived
        assert _same(found, sent)
    first, last = weights["T0"].data_ptr(), weights["T7"].data_ptr() + weights["T7"].nbytes
    in_file = [piece for piece in pieces[2:] if first <= _address(piece) < last]
    assert sum(map(len, in_file)) > 0.8 * (last - first)


def test_what_is_sent_of_a_file_stays_after_the_tensors(tmp_path: Path, pieces: list[Any]) -> None:
    weights = _written(tmp_path)
    content = weights["T0"].numpy().tobytes()
    _sent(dict(weights))
    del weights
    gc.collect()
    assert b"".join(bytes(piece) for piece in pieces[2:]).startswith(content)


@pytest.mark.parametrize(("peers", "expected"), [(1, 10 << 20), (16, 10 << 20), (20, 8 << 20), (1000, 1 << 20)])
def test_pieces_for_many_peers_are_smaller_and_what_they_send_too(pieces: list[Any], peers: int, expected: int) -> None:
    peer = TensorEndpoint()
    _, arrived = _sent({"T0": torch.arange(3 << 20)}, peer, piece_size_for(peers))
    assert max(map(len, pieces[2:])) == expected
    del pieces[1:]
    _sent(arrived, piece_size=peer.piece_size)
    assert max(map(len, pieces[2:])) == expected


def test_peer_cannot_make_pieces_larger_or_tiny() -> None:
    endpoint = TensorEndpoint(piece_size_for(20))
    endpoint.adapt_to(piece_size_for(1))
    assert endpoint.piece_size == piece_size_for(20)
    endpoint.adapt_to(1)
    assert endpoint.piece_size == 1 << 20


def test_small_tensors_are_joined_once_for_all_who_are_sent_them_at_a_time() -> None:
    stream = TensorStream({f"T{k}": torch.full((4,), float(k)) for k in range(9)}, 64)
    _, _, state = stream.produce(None, "site-1")
    _, [one], following = stream.produce(state, "site-1")
    _, [other], _ = stream.produce(state, "site-2")
    assert _address(one) == _address(other)
    _, [next_one], _ = stream.produce(following, "site-1")
    assert _address(next_one) != _address(one)


# A site that adds a change to its model while it arrives.


class _Task:
    """What NVFlare hands over, as far as an exchange looks at it."""

    def __init__(self, params: Tensors, kind: Kind, current_round: int) -> None:
        self.params, self.current_round = params, current_round
        self.meta = {KIND_KEY: str(kind), VERSION_KEY: VERSION}


@pytest.fixture
def site(pieces: list[Any]) -> SiteExchange:  # noqa: ARG001
    exchange = SiteExchange("site-1", Wire.BF16_DIFF, ChangeFilter(FiltersSpec()), {})
    exchange.take(_Task(_model(), Kind.FULL, 3))  # type: ignore[arg-type]
    return exchange


def _model() -> Tensors:
    return {"w": torch.arange(90, dtype=torch.float32).reshape(9, 10), "b": torch.ones(5)}


def _change(version: int) -> Tensors:
    generator = torch.Generator().manual_seed(version)
    sizes = {"w": (9, 10), "b": (5,)}
    changes = {name: rounded(torch.randn(size, generator=generator), Wire.BF16_DIFF) for name, size in sizes.items()}
    return {name: Delta(change, name, version) for name, change in changes.items()}


def test_change_is_added_as_it_arrives_and_only_once(site: SiteExchange) -> None:
    expected = {name: tensor + _change(4)[name] for name, tensor in _model().items()}
    for _ in range(2):  # NVFlare may deliver a task again
        _, arrived = _sent(_change(4), TensorEndpoint(deltas=site))
        assert all(tensor.is_meta for tensor in arrived.values())
        site.take(_Task(dict(arrived), Kind.CHANGE, 4))  # type: ignore[arg-type]
        assert _same(site.given, expected)


def test_change_to_another_model_than_the_sites_is_an_error(site: SiteExchange) -> None:
    with pytest.raises(
        ExchangeError, match=r"site-1: has the model after 3 rounds, but received the change for round 5$"
    ):
        _sent(_change(5), TensorEndpoint(deltas=site))
    assert _same(site.given, _model())


def test_model_with_a_part_of_a_change_needs_to_be_sent_whole(site: SiteExchange, pieces: list[Any]) -> None:
    receiver = TensorEndpoint(deltas=site)
    pieces[0].most = 3
    with pytest.raises(TransferError):
        _sent(_change(4), receiver)
    pieces[0].most = None
    with pytest.raises(ExchangeError, match="has the model after 3 rounds in part"):
        _sent(_change(4), receiver)
    site.take(_Task(_model(), Kind.FULL, 4))  # type: ignore[arg-type]
    _sent(_change(5), receiver)
    assert _same(site.given, {name: tensor + _change(5)[name] for name, tensor in _model().items()})


@pytest.mark.usefixtures("pieces")
def test_in_fp32_the_given_model_is_let_go_of_and_the_change_still_right() -> None:
    exchange = SiteExchange("site-1", Wire.FP32, ChangeFilter(FiltersSpec()), {})
    exchange.take(_Task(_model(), Kind.FULL, 0))  # type: ignore[arg-type]
    trained = {name: tensor * 3 for name, tensor in _model().items()}
    changes = exchange.changes({name: _copies_of(tensor.reshape(-1)) for name, tensor in trained.items()}, Kind.CHANGE)
    assert exchange.given == {}
    assert _same(
        {name: materialize(change) for name, change in changes.items()}, {n: t * 2 for n, t in _model().items()}
    )


def _copies_of(flat: torch.Tensor) -> Callable[[int, int], torch.Tensor]:
    return lambda first, last: flat[first:last].clone()
