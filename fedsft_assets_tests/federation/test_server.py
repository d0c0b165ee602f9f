"""The server part without a server: the average, what is written down of a round, and which model is kept."""

import itertools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from fedsft_assets.federation.metrics import (
    FIRST_KEY,
    METRICS_FILE,
    POINTS_KEY,
    SAMPLES_KEY,
    Point,
    parse_point,
    points_to_data,
)
from fedsft_assets.federation.server import (
    BEST_MODEL,
    LAST_MODEL,
    FederatedSFT,
    TokenWeightedAverage,
    read_nemo_weights,
)

Weights = dict[str, torch.Tensor]
TOKENS = {"site-1": 17, "site-2": 100_003, "site-3": 4_321}


def _weights(seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": (torch.randn(50, 8, generator=generator) * 100).to(dtype),
        "layer.weight": torch.randn(8, 8, generator=generator).to(dtype),
        "layer.scale": torch.randn((), generator=generator).to(dtype),
    }


def _result(site: str, params: Weights, tokens: object, **meta: object) -> FLModel:
    copied = {name: value.clone() for name, value in params.items()}
    known = {} if tokens is None else {FLMetaKey.NUM_STEPS_CURRENT_ROUND: tokens}
    return FLModel(params_type=ParamsType.FULL, params=copied, meta={"client_name": site, **known, **meta})


def _average(results: list[FLModel]) -> Weights:
    average = TokenWeightedAverage()
    for result in results:
        average.accept_model(result)
    weights: Weights = average.aggregate_model().params
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_is_weighted_by_tokens_as_numpy_has_it_in_float64(dtype: torch.dtype) -> None:
    sites = {site: _weights(seed, dtype) for seed, site in enumerate(TOKENS)}
    averaged = _average([_result(site, weights, TOKENS[site]) for site, weights in sites.items()])
    for name, value in averaged.items():
        expected = np.average(
            [weights[name].to(torch.float64).numpy() for weights in sites.values()],
            axis=0,
            weights=list(TOKENS.values()),
        )
        assert value.dtype == torch.float32
        np.testing.assert_allclose(value.numpy(), expected.astype(np.float32), rtol=2e-7, atol=0)


def test_average_does_not_depend_on_the_order_of_arrival() -> None:
    sites = {site: _weights(seed) for seed, site in enumerate(TOKENS)}
    averages = [
        _average([_result(site, sites[site], TOKENS[site]) for site in order])
        for order in itertools.permutations(sites)
    ]
    for other in averages[1:]:
        for name, value in averages[0].items():
            assert torch.equal(value, other[name])


def test_site_of_its_own_gets_back_what_it_sent() -> None:
    weights = _weights(1)
    for name, value in _average([_result("site-1", weights, 12_345)]).items():
        assert torch.equal(value, weights[name])


def test_small_updates_of_large_weights_are_not_lost() -> None:
    """In float32, a sum weighted by many tokens would round them away."""
    base = torch.full((4,), 1000.0)
    step = torch.tensor([0.0, 1e-4, 1.2e-4, 2e-4])
    sites = [_result(f"site-{k}", {"w": base + step}, 10_000_019 + k) for k in range(3)]
    assert torch.equal(_average(sites)["w"], base + step)


def test_average_of_a_round_starts_from_nothing() -> None:
    average = TokenWeightedAverage()
    average.accept_model(_result("site-1", _weights(1), 5))
    average.aggregate_model()
    average.reset_stats()
    average.accept_model(_result("site-1", _weights(2), 7))
    assert torch.equal(average.aggregate_model().params["embedding"], _weights(2)["embedding"])
    assert len(average.results) == 1


def test_sites_that_began_with_other_adapters_are_not_averaged() -> None:
    average = TokenWeightedAverage()
    average.accept_model(_result("site-1", _weights(1), 5, **{FIRST_KEY: "a"}))
    average.accept_model(_result("site-2", _weights(2), 5, **{FIRST_KEY: "a"}))
    with pytest.raises(ValueError, match="site-3: began with another base model or other adapters than site-1"):
        average.accept_model(_result("site-3", _weights(3), 5, **{FIRST_KEY: "b"}))


def test_job_without_a_base_model_at_the_server_begins_empty() -> None:
    first = FederatedSFT(num_clients=2, num_rounds=3).load_model()
    assert (first.params, first.params_type) == ({}, ParamsType.FULL)


@pytest.mark.parametrize("tokens", [None, 0, -3, 2.5, "12"])
def test_result_without_a_number_of_tokens_is_an_error_that_names_the_site(tokens: object) -> None:
    average = TokenWeightedAverage()
    with pytest.raises(
        ValueError, match=f"site-2: expected the number of answer tokens it trained on, found {tokens!r}"
    ):
        average.accept_model(_result("site-2", _weights(1), tokens))


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"layer.weight": torch.ones(8, 8)}, r"embedding, layer\.scale"),
        ({**_weights(2), "extra": torch.ones(1)}, "extra"),
        ({**_weights(2), "layer.weight": torch.ones(1, 8)}, r"layer\.weight"),
    ],
    ids=["fewer", "more", "another shape"],
)
def test_tensors_that_differ_from_those_of_other_sites_are_an_error_that_names_them(odd: Weights, said: str) -> None:
    average = TokenWeightedAverage()
    average.accept_model(_result("site-1", _weights(1), 5))
    with pytest.raises(ValueError, match=f"site-2: tensors differ from those of the other sites: {said}"):
        average.accept_model(_result("site-2", odd, 5))


Archive = Callable[..., Path]


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    """Packs files as NeMo packs an archive."""

    def pack(state: object = None, **files: str) -> Path:
        path = tmp_path / "model.nemo"
        with tarfile.open(path, "w:") as tar:
            for name, content in files.items():
                (tmp_path / name).write_text(content)
                tar.add(tmp_path / name, f"./{name}")
            if state is not None:
                torch.save(state, tmp_path / "model_weights.ckpt")
                tar.add(tmp_path / "model_weights.ckpt", "./model_weights.ckpt")
        return path

    return pack


def test_weights_of_an_archive_are_read_in_float32_with_tied_tensors_once(archive: Archive) -> None:
    embedding = torch.randn(6, 4).to(torch.bfloat16)
    state = {"embed.weight": embedding, "norm": torch.ones(4), "head.weight": embedding}
    weights = read_nemo_weights(archive(state, config="x: 1"))
    assert list(weights) == ["embed.weight", "norm"]
    assert all(value.dtype == torch.float32 for value in weights.values())
    assert torch.equal(weights["embed.weight"], embedding.float())


def test_equal_tensors_that_are_not_tied_are_both_read(archive: Archive) -> None:
    weights = read_nemo_weights(archive({"a": torch.ones(3), "b": torch.ones(3)}))
    assert list(weights) == ["a", "b"]


def test_archive_without_weights_is_an_error_that_names_it(archive: Archive) -> None:
    path = archive(config="x: 1")
    with pytest.raises(ValueError, match=f"{path}: has no model_weights.ckpt; is it a .nemo archive"):
        read_nemo_weights(path)


def test_file_that_is_no_archive_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.nemo"
    path.write_text("not an archive")
    with pytest.raises(tarfile.ReadError):
        read_nemo_weights(path)
    with pytest.raises(FileNotFoundError):
        read_nemo_weights(tmp_path / "missing.nemo")


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code from the archive ran",))


def test_archive_cannot_run_code(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="Weights only load failed"):
        read_nemo_weights(archive({"a": _Harmful()}))
    assert capsys.readouterr().out == ""


class _Server(FederatedSFT):
    """The workflow in a folder of the test's, without NVFlare's engine around it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(base_model="base.nemo", num_clients=2, num_rounds=3)
        self.folder = folder
        self.fl_ctx = None

    def get_run_dir(self) -> str:
        return str(self.folder)

    def play_round(self, current_round: int, results: list[FLModel]) -> Weights:
        """What NVFlare does with the results of a round."""
        self.current_round = current_round
        self.aggregator.reset_stats()
        for result in results:
            self._aggregate_one_result(result)
        model = self.aggregator.aggregate_model()
        self.save_model(model)
        weights: Weights = model.params
        return weights


def _round(site: str, received_loss: float, seen: list[int], losses: list[float], round_number: int) -> FLModel:
    """A site's result: the loss of what it received on 40 tokens, and one point for each of its steps."""
    before = seen[0] - 16
    points = [
        Point("val_loss", received_loss, round_number - 1, before, site, tokens=40 if site == "site-1" else 120),
        *(
            Point("train_loss", loss, round_number, samples, site, step, 100 * step)
            for step, (samples, loss) in enumerate(zip(seen, losses, strict=True), start=1)
        ),
        Point("val_loss_local", 0.5, round_number, seen[-1], site),
    ]
    meta = {POINTS_KEY: points_to_data(points), SAMPLES_KEY: seen[-1] - before}
    return _result(site, _weights(round_number), 10, **meta)


def _written(server: _Server, name: str) -> list[Point]:
    lines = (server.folder / METRICS_FILE).read_text().splitlines()
    return [point for point in map(parse_point, lines) if point.name == name]


@pytest.fixture
def server(tmp_path: Path) -> _Server:
    return _Server(tmp_path)


def test_round_is_written_down_as_one_curve_of_all_sites_beside_those_of_each(server: _Server) -> None:
    server.play_round(
        0,
        [
            _round("site-1", 7.0, [16, 32, 48], [3.0, 2.0, 1.0], round_number=1),
            _round("site-2", 6.0, [16, 24], [6.0, 4.0], round_number=1),
        ],
    )
    received = _written(server, "val_loss")
    assert received[0] == Point("val_loss", pytest.approx((7.0 * 40 + 6.0 * 120) / 160), 0, 0)
    assert [(point.site, point.value) for point in received[1:]] == [("site-1", 7.0), ("site-2", 6.0)]
    merged = [point for point in _written(server, "train_loss") if point.site is None]
    assert merged == [
        Point("train_loss", 4.5, 1, 32, None, 1, 200),
        Point("train_loss", 3.0, 1, 56, None, 2, 400),
        Point("train_loss", 1.0, 1, 72, None, 3, 300),
    ]
    assert len(_written(server, "train_loss")) == 3 + 5
    assert len(_written(server, "val_loss_local")) == 2


def test_samples_of_all_sites_add_up_over_rounds(server: _Server) -> None:
    for k in range(2):
        first = 48 * k
        server.play_round(
            k,
            [
                _round("site-1", 7.0 - k, [first + 16, first + 32, first + 48], [3.0, 2.0, 1.0], round_number=k + 1),
                _round("site-2", 7.0 - k, [24 * k + 16, 24 * k + 24], [6.0, 4.0], round_number=k + 1),
            ],
        )
    whole = [(p.round, p.samples, p.value) for p in _written(server, "val_loss") if p.site is None]
    assert whole == [(0, 0, 7.0), (1, 72, 6.0)]
    merged = [p.samples for p in _written(server, "train_loss") if p.site is None]
    assert merged == [32, 56, 72, 104, 128, 144]


def test_samples_of_a_site_that_sits_a_round_out_still_count(server: _Server) -> None:
    first, second = (_round(site, 7.0, [16, 32], [3.0, 2.0], round_number=1) for site in ("site-1", "site-2"))
    server.play_round(0, [first, second])
    server.play_round(1, [_round("site-1", 6.0, [48], [1.0], round_number=2)])
    assert _written(server, "val_loss")[3].samples == 64
    assert [p.samples for p in _written(server, "train_loss") if p.site is None] == [32, 64, 80]


def _play(server: _Server, received_losses: list[float]) -> list[Weights]:
    """One site; `received_losses[k]` is what it finds for the model after k rounds."""
    models = []
    for k, loss in enumerate(received_losses):
        models.append(server.play_round(k, [_round("site-1", loss, [16 * k + 16], [1.0], round_number=k + 1)]))
    return models


def _kept(server: _Server, name: str) -> Weights:
    weights: Weights = torch.load(server.folder / name, weights_only=True)
    return weights


def test_best_model_is_the_one_that_was_scored_lowest_and_never_the_base(server: _Server) -> None:
    after_1, after_2, after_3 = _play(server, [0.1, 3.0, 2.0])
    assert torch.equal(_kept(server, LAST_MODEL)["embedding"], after_3["embedding"])
    assert torch.equal(_kept(server, BEST_MODEL)["embedding"], after_2["embedding"])
    assert not torch.equal(after_1["embedding"], after_2["embedding"])


def test_model_that_is_worse_than_an_earlier_one_is_not_kept(server: _Server) -> None:
    after_1, *_ = _play(server, [7.0, 2.0, 3.0])
    assert torch.equal(_kept(server, BEST_MODEL)["embedding"], after_1["embedding"])


def test_no_model_is_best_before_one_is_scored(server: _Server) -> None:
    _play(server, [7.0])
    assert (server.folder / LAST_MODEL).exists()
    assert not (server.folder / BEST_MODEL).exists()
    assert not list(server.folder.glob("*.new"))


def test_result_that_cannot_be_used_ends_the_job_with_the_reason(
    server: _Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVFlare alone would log it, go on with the other sites, and call the job a success."""
    said: list[str] = []
    monkeypatch.setattr(server, "panic", said.append)
    with pytest.raises(ValueError, match="site-2"):
        server.play_round(1, [_result("site-2", _weights(1), 0)])
    assert said == ["round 2: site-2: expected the number of answer tokens it trained on, found 0"]


def test_what_is_written_is_json_lines(server: _Server) -> None:
    _play(server, [7.0, 2.0])
    for line in (server.folder / METRICS_FILE).read_text().splitlines():
        assert {"name", "value", "round", "samples"} <= json.loads(line).keys()
