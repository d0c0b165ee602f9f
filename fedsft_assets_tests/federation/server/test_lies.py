"""A site that lies: what it says is refused, by name, round and cause, and nobody else pays for it."""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.fl_constant import FLMetaKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import make_reply
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellReturnCode
from nvflare.fuel.f3.message import Message
from nvflare.private.defs import CellMessageHeaderKeys

from fedsft_assets.federation.protocol.journal import Finished, Missed, Progress, RoundDone, Stopped
from fedsft_assets.federation.protocol.messages import (
    CONTROL,
    FAILURE_KEY,
    FIRST_KEY,
    KIND_KEY,
    RECORDS_KEY,
    SAMPLES_KEY,
    TRAIN_TASK,
    VALIDATE_TASK,
)
from fedsft_assets.federation.protocol.points import Point, points_to_data
from fedsft_assets_tests.federation.rounds import POINTS_KEY, Answer, Server, Site, deliver, play, same, says

pytestmark = pytest.mark.usefixtures("base_model")

TOKENS = FLMetaKey.NUM_STEPS_CURRENT_ROUND
Lie = Callable[[FLModel], object]


def _meta(**changes: Any) -> Lie:
    return lambda result: result.meta.update(changes)


def _param(name: str, change: Callable[[torch.Tensor], Any]) -> Lie:
    return lambda result: result.params.update({name: change(result.params[name])})


def _scaled(factor: float) -> Lie:
    return lambda result: result.params.update({name: one * factor for name, one in result.params.items()})


def _point(name: str, step: int | None = None, /, **changes: Any) -> Lie:
    def change(result: FLModel) -> None:
        for point in result.meta[POINTS_KEY]:
            if (point["name"], point["step"]) == (name, step):
                point.update(changes)

    return change


def _points(change: Callable[[list[Any]], Any]) -> Lie:
    return lambda result: result.meta.update({POINTS_KEY: change(result.meta[POINTS_KEY])})


def _tells(site: Site, lie: Lie) -> Callable[[FLModel], Answer]:
    def act(received: FLModel) -> FLModel:
        result = site.train(received)
        lie(result)
        return result

    return act


LIES: Mapping[str, tuple[Lie, str]] = {
    "no tokens": (_meta(**{TOKENS: 0}), "tokens: found 0: input should be greater than or equal to 1"),
    "negative tokens": (_meta(**{TOKENS: -5}), "tokens: found -5: input should be greater"),
    "no number of tokens": (_meta(**{TOKENS: None}), "tokens: found None: input should be a valid integer"),
    "true tokens": (_meta(**{TOKENS: True}), "tokens: found True: input should be a valid integer"),
    "a float of tokens": (_meta(**{TOKENS: 600.0}), "tokens: found 600.0: input should be a valid integer"),
    "tokens of numpy": (_meta(**{TOKENS: np.int64(600)}), "tokens: found a int64: input should be a valid integer"),
    "tokens as text": (_meta(**{TOKENS: "600"}), "tokens: found '600': input should be a valid integer"),
    "a million million tokens": (_meta(**{TOKENS: 10**12}), "tokens: found 1000000000000, expected at most 48000000"),
    "tokens beyond any count": (_meta(**{TOKENS: 10**30}), "tokens: found 1000000000000000000000000000000: input"),
    "more tokens than its steps": (_meta(**{TOKENS: 1_000}), "tokens: found 1000, expected 600, the sum of its steps"),
    "negative samples": (_meta(**{SAMPLES_KEY: -(10**9)}), "samples: found -1000000000: input should be greater"),
    "other samples": (_meta(**{SAMPLES_KEY: 49}), "samples: found 49, expected 48 in a round of 48 records"),
    "other records": (_meta(**{RECORDS_KEY: 10**9}), "records: found 1000000000, expected 48"),
    "no records": (_meta(**{RECORDS_KEY: None}), "records: found None: input should be a valid integer"),
    "another kind": (_meta(**{KIND_KEY: "full"}), "kind: found 'full', expected 'change'"),
    "no kind": (_meta(**{KIND_KEY: None}), "kind: found None: input should be a valid string"),
    "a kind that is none": (_meta(**{KIND_KEY: "\x1b[31m"}), "kind: found '\\x1b[31m', expected 'change'"),
    "another base model": (
        _meta(**{FIRST_KEY: "x"}),
        "started from a base model or adapters that differ from those of",
    ),
    "a digest that is none": (_meta(**{FIRST_KEY: [1]}), "first: found a list: input should be a valid string"),
    "a failure that is none": (_meta(**{FAILURE_KEY: [1]}), "failure: found a list, expected a traceback"),
    "an empty failure": (_meta(**{FAILURE_KEY: ""}), "failure: found '', expected a traceback"),
    "no points": (_meta(**{POINTS_KEY: None}), "points: found None: input should be a valid array"),
    "an empty list of points": (_points(lambda _: []), "val_loss: found '0 points', expected 1"),
    "points in a dictionary": (
        _points(lambda points: dict(enumerate(points))),
        "points: found a dict: input should be",
    ),
    "a point that is text": (
        _points(lambda points: [*points, "loss"]),
        "points.5: found 'loss': input should be an object",
    ),
    "a point without its round": (
        _points(lambda p: [*p[:-1], {"name": "val_loss"}]),
        "points.4.value: found a dict:",
    ),
    "a point of another site": (
        _point("val_loss", site="site-1"),
        "points.0.site: found 'site-1': extra inputs are",
    ),
    "a point of the whole job": (
        _point("val_loss", site=None),
        "points.0.site: found None: extra inputs are not",
    ),
    "a metric of its own": (
        _point("val_loss", name="accuracy"),
        "points.0.name: found 'accuracy': expected the name",
    ),
    "a negative loss": (
        _point("val_loss", value=-329.0),
        "val_loss: found -329.0, expected a number that is not",
    ),
    "a negative loss of a step": (
        _point("train_loss", 2, value=-1e-9),
        "train_loss: found -1e-09, expected a number",
    ),
    "a loss that is no number": (_point("val_loss", value=math.nan), "val_loss: found nan, expected a finite number"),
    "an infinite loss": (_point("val_loss_local", value=math.inf), "val_loss_local: found inf, expected a finite"),
    "a loss as text": (
        _point("val_loss", value="4.0"),
        "points.0.value: found '4.0': input should be a valid number",
    ),
    "a loss that is too good": (_point("val_loss", value=1e-4), "val_loss: found 0.0001 over 40 tokens, expected"),
    "a loss that is too bad": (_point("val_loss", value=4.5), "val_loss: found 4.5 over 40 tokens, expected"),
    "a score of other tokens": (_point("val_loss", tokens=41), "val_loss: found 4 over 41 tokens, expected"),
    "a score of no tokens": (
        _point("val_loss", tokens=0),
        "points.0.tokens: found 0: input should be greater",
    ),
    "a score of nothing": (_point("val_loss", tokens=None), "val_loss: tokens: found None, expected 1 to 10000000 in"),
    "a score of too many tokens": (_point("val_loss", tokens=10**9), "val_loss: tokens: found 1000000000, expected 1"),
    "a score of another round": (_point("val_loss", round=3), "val_loss: round: found 3, expected 1"),
    "a score of another step": (_point("val_loss", None, step=1), "val_loss: step: found 1, expected none"),
    "a score after other samples": (_point("val_loss", samples=0), "val_loss: samples: found 0, expected 48"),
    "a score of the past": (
        _point("val_loss", time=-1e18),
        "points.0.time: found -1e+18: input should be greater",
    ),
    "a score of the far future": (
        _point("val_loss", time=1e300),
        "points.0.time: found 1e+300: input should be less",
    ),
    "a step that was not": (_points(lambda p: [*p, {**p[1], "step": 4}]), "train_loss: found '4 points', expected 3"),
    "a step that is left out": (_points(lambda points: [*points[:3], points[4]]), "train_loss: found '2 points'"),
    "a step twice": (
        _point("train_loss", 2, step=1),
        "train_loss: found 7 over 200 tokens, but the site reported",
    ),
    "a step of no tokens": (
        _point("train_loss", 2, tokens=0),
        "points.2.tokens: found 0: input should be greater",
    ),
    "a step of too many tokens": (_point("train_loss", 2, tokens=10**8), "train_loss: tokens: found 100000000, expe"),
    "a step of another round": (_point("train_loss", 1, round=1), "train_loss: found '2 points', expected 3"),
    "a step over no record": (_point("train_loss", 2, samples=64), "train_loss: samples: found 64, expected up to 16"),
    "a step over many records": (_point("train_loss", 1, samples=90), "train_loss: samples: found 90, expected up to"),
    "seconds of nothing": (
        _points(lambda p: [*p, {**p[0], "name": "system/dream_seconds"}]),
        "points.5.name: found",
    ),
    "negative seconds": (
        _points(lambda p: [*p, {**p[0], "name": "system/train_seconds", "value": -1.0}]),
        "system/",
    ),
    "CPU seconds of the server": (
        _points(lambda p: [*p, {**p[0], "name": "system/server_cpu_seconds"}]),
        "points.5.name: found",
    ),
    "fewer bytes than none": (
        _points(lambda p: [*p, {**p[0], "name": "system/sent_bytes", "value": -1.0}]),
        "system/",
    ),
    "another tensor": (
        lambda result: result.params.update(extra=torch.ones(1)),
        "tensors differ from those of the global model: extra",
    ),
    "another shape": (_param("embedding", lambda one: one[:1]), "tensors differ from those of the global model: embed"),
    "an array of numpy": (_param("embedding", lambda one: one.numpy()), "embedding: found ndarray, expected a tensor"),
    "a list": (_param("embedding", lambda one: one.tolist()), "embedding: found list, expected a tensor"),
    "a text": (_param("embedding", str), "embedding: found str, expected a tensor"),
    "no tensors": (
        lambda result: setattr(result, "params", None),
        "params: found NoneType, expected a dict of tensors",
    ),
    "a list of tensors": (lambda result: setattr(result, "params", [torch.ones(1)]), "params: found list, expected"),
    "other numbers": (_param("embedding", torch.Tensor.double), "embedding: found torch.float64, expected"),
    "complex numbers": (_param("embedding", lambda one: one + 1j), "embedding: found torch.complex64"),
    "a sparse tensor": (_param("embedding", torch.Tensor.to_sparse), "embedding: found a tensor without data"),
    "a number that is none": (_param("layer.scale", lambda one: one * math.nan), "layer.scale has non-finite values"),
    "an infinite number": (_param("layer.scale", lambda one: one + math.inf), "layer.scale has non-finite values"),
    "a direction": (
        lambda result: result.params.update({f"{CONTROL}embedding": torch.ones(50, 8)}),
        "tensors differ from those of the global model: control:embedding",
    ),
    "an update a thousand times as large": (_scaled(1_000), "the norm of its update is "),
    "an update that is turned around, and large": (_scaled(-300), "the norm of its update is "),
}


@pytest.mark.parametrize(("lie", "why"), LIES.values(), ids=LIES.keys())
def test_lie_ends_the_job_with_the_name_of_the_site_the_round_and_the_cause(tmp_path: Path, lie: Lie, why: str) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, max_update_ratio=10.0)
    sites[1].does(TRAIN_TASK, 1, _tells(sites[1], lie))
    server.run()
    (reason,) = server.panics
    assert reason.replace("a message: ", "").startswith(f"round 2: site-2: {why}")
    assert server.entries[-1] == Stopped(reason, lost_sites=False)
    assert server.of(RoundDone) == [RoundDone(1)]
    assert [point.site for point in server.points("val_loss") if point.round > 0] == []


@pytest.mark.parametrize(("lie", "why"), LIES.values(), ids=LIES.keys())
def test_with_enough_others_the_round_goes_on_as_if_the_liar_had_not_been_there(
    tmp_path: Path, lie: Lie, why: str
) -> None:
    def ran(folder: str, answer: Callable[[Site], Callable[[FLModel], Answer]]) -> Server:
        sites = [Site(f"site-{k}") for k in (1, 2, 3, 4)]
        server = Server(tmp_path / folder, sites, min_sites=2, max_update_ratio=10.0)
        sites[1].does(TRAIN_TASK, 1, answer(sites[1]))
        server.run()
        assert server.of(Finished) == [Finished()]
        return server

    server = ran("lie", lambda site: _tells(site, lie))
    honest = ran("silence", lambda _: lambda _: ReturnCode.EXECUTION_EXCEPTION)
    (missed,) = server.of(Missed)
    assert (missed.site, missed.round) == ("site-2", 2)
    assert missed.reason.replace("a message: ", "").startswith(f"refused: {why}")
    assert same(server.left("last_global_model.pt"), honest.left("last_global_model.pt"))
    assert [p for p in server.of(Point) if p.site is None] == [p for p in honest.of(Point) if p.site is None]


@pytest.mark.parametrize("lie", ["a loss that is too good", "an update a thousand times as large"])
def test_of_two_sites_that_do_not_agree_nobody_knows_who_is_right(tmp_path: Path, lie: str) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites, min_sites=1, max_update_ratio=10.0)
    sites[1].does(TRAIN_TASK, 1, _tells(sites[1], LIES[lie][0]))
    server.run()
    (reason,) = server.panics
    assert reason.startswith("round 2: ")
    assert "site-2" in reason
    assert server.of(RoundDone) == [RoundDone(1)]


def test_site_that_is_refused_in_one_round_takes_part_in_the_next(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, min_sites=2)
    sites[1].does(TRAIN_TASK, 0, _tells(sites[1], _meta(**{TOKENS: -1})))
    server.run()
    assert [(one.site, one.round) for one in server.of(Missed)] == [("site-2", 1)]
    assert {p.site for p in server.of(Point) if p.name == "train_loss" and p.round == 2} >= {"site-2"}


def test_lie_of_the_last_score_is_left_out_of_it_and_told(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, min_sites=2)

    def lies(received: FLModel) -> FLModel:
        result = sites[1].validate(received)
        _point("val_loss", value=0.0)(result)
        return result

    sites[1].does(VALIDATE_TASK, 3, lies)
    server.run()
    assert server.of(Finished) == [Finished()]
    assert server.points("val_loss")[-1].value == 2.0
    assert Progress(
        "site-2 · missing from the final validation: refused: val_loss: found 0 over 40 tokens, expected 2"
        " over 40 tokens"
    ) in server.of(Progress)


def test_lie_that_comes_first_does_not_make_liars_of_the_others(tmp_path: Path) -> None:
    """Where sites begin with adapters of their own, the first to answer does not say what all must have."""
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, base_model=None, min_sites=2)

    def other_adapters(result: FLModel) -> None:
        result.meta[FIRST_KEY] = "x"
        result.params["embedding"] = torch.ones(1, 1)

    sites[0].does(TRAIN_TASK, 0, _tells(sites[0], other_adapters))
    play(server, 1)
    (missed,) = server.of(Missed)
    assert missed.site == "site-1"
    assert missed.reason.startswith("refused: started from a base model or adapters that differ from those of site-2")
    assert server.global_model.weights["embedding"].shape == (50, 8)
    assert server.state.progress.first is None


def test_private_site_is_held_to_the_records_that_it_said_first(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites)
    limits = {**server.limits, "records": {**server.limits["records"], "site-2": None}}
    server = Server(tmp_path, sites, limits=limits)

    def more(received: FLModel) -> FLModel:
        return Site("site-2", steps=8).train(received)

    sites[1].does(TRAIN_TASK, 1, more)
    server.run()
    assert server.panics == ["round 2: site-2: records: found 128, expected 48"]
    assert Progress("site-2 · reports 48 training records of its own") in server.of(Progress)
    assert (
        Server(tmp_path, sites, limits=limits).review.records("site-2") == 48
    )  # a server that is started again knows it


def test_site_with_many_more_steps_may_go_further(tmp_path: Path) -> None:
    sites = [Site("site-1", steps=1), Site("site-2", steps=1), Site("site-3", steps=8)]
    server = Server(tmp_path, sites, max_update_ratio=10.0)
    sites[2].does(TRAIN_TASK, 0, _tells(sites[2], _scaled(50)))
    play(server, 1)
    assert server.of(RoundDone) == [RoundDone(1)]


def test_update_of_any_size_is_taken_where_the_job_says_so(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, max_update_ratio=None)
    sites[1].does(TRAIN_TASK, 0, _tells(sites[1], _scaled(1e6)))
    play(server, 1)
    assert server.of(RoundDone) == [RoundDone(1)]


def test_result_that_is_no_model_is_refused_not_taken_for_an_answer(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2)]
    server = Server(tmp_path, sites)

    def nonsense(_: FLModel) -> None:
        assert not server._accept_train_result("site-2", make_reply(ReturnCode.OK), FLContext())

    sites[1].does(TRAIN_TASK, 1, nonsense)
    server.run()
    assert server.panics[0].startswith("round 2: site-2: its result is not an NVFlare model: ")


def test_site_whose_result_does_not_arrive_is_lost_not_refused(tmp_path: Path) -> None:
    """Its trainer has died while the result was fetched: another attempt may succeed."""
    sites = [Site(f"site-{k}") for k in (1, 2)]
    server = Server(tmp_path, sites)

    def dies(_: FLModel) -> None:
        message = Message({CellMessageHeaderKeys.TOKEN: "token of site-2"}, None)
        server.note_lost(message, "producer error after 3 secs")

    sites[1].does(TRAIN_TASK, 1, dies)
    server.run()
    (missed,) = server.of(Missed)
    assert missed == Missed("site-2", 2, "its result did not arrive: producer error after 3 secs")
    (stopped,) = server.of(Stopped)
    assert stopped.lost_sites


@pytest.mark.parametrize("code", ["HACKED\x1b[2J", 17, ["OK"]])
def test_code_that_is_none_of_nvflares_is_not_written_down(tmp_path: Path, code: Any) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2)]
    server = Server(tmp_path, sites)

    def gone(_: FLModel) -> None:
        reply = make_reply(ReturnCode.OK)
        reply.set_return_code(code)
        server._accept_train_result("site-2", reply, FLContext())

    sites[1].does(TRAIN_TASK, 0, gone)
    server.run()
    assert [one.reason for one in server.of(Missed)] == ["its trainer exited (no reason given)"]


# While it works.


def _while_it_works(site: Site, act: Callable[[], object]) -> Callable[[FLModel], Answer]:
    def works(received: FLModel) -> FLModel:
        act()
        return site.train(received)

    return works


STEP = Point("train_loss", 8.0, 1, 16, "site-2", 1, 100)
WORDS: Mapping[str, tuple[dict[str, Any], str]] = {
    "another's text": ({"text": "round 1 of 3\nsite-1 · has failed"}, "a message: text: found 'round 1"),
    "colours of a terminal": ({"text": "\x1b[31mred"}, "a message: text: found '\\x1b[31mred': expected a single line"),
    "a long text": ({"text": "x" * 501}, "a message: text: found 'xxxx"),
    "a text that is none": ({"text": 5}, "a message: text: found 5: input should be a valid string"),
    "no points": ({"points": None}, "a message: points: found None: input should be a valid array"),
    "a point of another site": ({"points": [{"name": "val_loss", "site": "site-1"}]}, "a message: points.0.value: fou"),
    "a negative loss": (
        {"points": [{"name": "val_loss", "value": -1, "round": 0, "samples": 0, "time": 1.0}]},
        "a message: val_loss: found -1.0, expected a number that is not negative",
    ),
    "a loss that is none": (
        {"points": [{"name": "val_loss", "value": math.nan, "round": 0, "samples": 0, "time": 1.0}]},
        "val_loss: found nan, expected a finite number; try a lower learning rate",
    ),
    "a far round": (
        {"points": [{"name": "val_loss", "value": 1, "round": 10**6, "samples": 0, "time": 1.0}]},
        "a message: val_loss: round: found 1000000, expected 0",
    ),
    "something more": ({"more": 1}, "a message: more: found 1: extra inputs are not permitted"),
}


@pytest.mark.parametrize(("changes", "why"), WORDS.values(), ids=WORDS.keys())
def test_lie_while_it_works_is_refused_before_its_result(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites)
    lies = _while_it_works(
        sites[1], lambda: deliver(server, "site-2", json.dumps({"id": "1", "text": "busy", "points": [], **changes}))
    )
    sites[1].does(TRAIN_TASK, 0, lies)
    server.run()
    (reason,) = server.panics
    assert reason.startswith(f"round 1: site-2: {why}")
    assert [point for point in server.of(Point) if point.site == "site-2"] == []
    assert [entry for entry in server.of(Progress) if entry.text.startswith("site-2")] == []


@pytest.mark.parametrize("content", [None, b"{}", ["x"], {"text": "x", "points": []}, "no JSON", "[]", 5])
def test_message_that_is_no_message_is_refused(tmp_path: Path, content: Any) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2)]
    server = Server(tmp_path, sites)
    sites[1].does(TRAIN_TASK, 0, _while_it_works(sites[1], lambda: deliver(server, "site-2", content)))
    server.run()
    assert server.panics[0].startswith("round 1: site-2: a message: ")


def test_point_of_a_result_is_the_one_that_was_told_before(tmp_path: Path) -> None:
    """That one is written down, and so in MLflow."""
    sites = [Site(f"site-{k}") for k in (1, 2)]
    server = Server(tmp_path, sites)
    said = Point("train_loss", 0.25, 1, 16, "site-2", 1, 100)
    sites[1].does(TRAIN_TASK, 0, _while_it_works(sites[1], lambda: says(server, "site-2", "busy", [said])))
    server.run()
    assert server.panics[0].startswith("round 1: site-2: a message: train_loss: found 8 over 100 tokens, but the")


def test_message_that_is_sent_again_is_answered_again_and_changes_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path, [Site(f"site-{k}") for k in (1, 2)])
    message = json.dumps({"id": "1", "text": "busy", "points": points_to_data([STEP])})
    assert [deliver(server, "site-2", message) for _ in range(3)] == [CellReturnCode.OK] * 3
    assert server.entries == [Progress("site-2 · busy"), STEP]


def test_message_is_answered_when_it_is_written_down_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a callback raises is an answer that is not OK, at NVFlare."""
    server = Server(tmp_path, [Site("site-1")])

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(server.journal, "add", full)
        with pytest.raises(OSError, match="no space left"):
            says(server, "site-1", "busy")
    says(server, "site-1", "busy")
    assert server.entries == [Progress("site-1 · busy")]


def test_what_a_stranger_says_is_nobodys_word(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2)]
    server = Server(tmp_path, sites)
    for stranger in ("site-9", ""):
        assert deliver(server, stranger, "{}") == CellReturnCode.UNAUTHENTICATED
    assert server.entries == []
    assert server.warnings == ["ignored a message from a cell: not a site of this job"] * 2
    server.connected = ["site-1"]  # who is not in the job has no word in it
    says(server, "site-2", "has failed", [STEP])
    assert server.entries == []


def test_point_is_written_down_as_of_who_has_sent_it(tmp_path: Path) -> None:
    server = Server(tmp_path, [Site(f"site-{k}") for k in (1, 2)])
    says(server, "site-1", "site-2 · has failed", [STEP])
    assert server.of(Progress) == [Progress("site-1 · site-2 · has failed")]
    assert [point.site for point in server.of(Point)] == ["site-1"]


def test_fault_of_the_server_itself_is_told_and_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path, [Site("site-1")])

    def fails(*_: object) -> None:
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("fedsft_assets.federation.server.rounds.merged_train_loss", fails)
    server.run()
    (stopped,) = server.of(Stopped)
    assert stopped.reason.startswith("the job's server process failed: ZeroDivisionError('by nothing')\nTraceback")
    assert not stopped.lost_sites


def test_nobody_waits_for_a_refused_site(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2)]
    server = Server(tmp_path, sites)  # with half an hour for site-1, which is silent
    sites[0].does(TRAIN_TASK, 0, lambda _: None)
    sites[1].does(TRAIN_TASK, 0, _tells(sites[1], _meta(**{TOKENS: None})))
    begun = time.monotonic()
    server.run()
    assert server.panics == ["round 1: site-2: tokens: found None: input should be a valid integer"]
    assert time.monotonic() - begun < server.site_timeout / 10
