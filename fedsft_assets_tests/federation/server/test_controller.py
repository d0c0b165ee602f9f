"""The server part without a server: rounds with sites that answer, fail or say nothing, and what is written down."""

import json
import math
import os
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import dots

from fedsft_assets.federation.protocol.journal import (
    JOURNAL_FILE,
    Finished,
    Missed,
    Progress,
    Regroup,
    RoundDone,
    Started,
    Stopped,
    from_line,
)
from fedsft_assets.federation.protocol.messages import (
    BEST_MODEL,
    EXECUTION_KEY,
    FAILURE_KEY,
    FIRST_KEY,
    LAST_MODEL,
    STATE_ROOT,
    TRAIN_TASK,
    VALIDATE_TASK,
    Kind,
    Wire,
)
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.server.aggregation import TokenWeightedAverage
from fedsft_assets.federation.server.base_model import own_base_model, read_nemo_weights
from fedsft_assets.federation.server.controller import NotEnoughSitesError
from fedsft_assets.federation.server.newcomers import PresenceTimes
from fedsft_assets.federation.server.presence import Part
from fedsft_assets.federation.transport.buffers import ReusedFiles
from fedsft_assets.federation.transport.install import StreamDecomposer
from fedsft_assets.specs.job import FedAvg, FedOpt
from fedsft_assets_tests.federation.rounds import (
    BASE,
    POINTS_KEY,
    Answer,
    Server,
    Site,
    Weights,
    copied,
    play,
    same,
    says,
    weights,
)

pytestmark = pytest.mark.usefixtures("base_model")


# What is written down of rounds.


def test_round_is_written_down_as_one_curve_of_all_sites_beside_those_of_each(tmp_path: Path) -> None:
    one, other = Site("site-1", steps=3), Site("site-2", steps=2)
    one.losses[0], other.losses[0] = 7.0, 7.0002
    server = Server(tmp_path, [one, other])
    other.does(TRAIN_TASK, 0, lambda received: _with(other.train(received), losses=[6.0, 4.0]))
    play(server, 1)
    assert server.points("val_loss") == [Point("val_loss", pytest.approx(7.0001), 0, 0)]
    assert [point.value for point in server.points("val_loss", "site-2")] == [7.0002]
    assert server.points("train_loss") == [
        Point("train_loss", 7.0, 1, 32, None, 1, 200),
        Point("train_loss", 5.5, 1, 64, None, 2, 400),
        Point("train_loss", 6.0, 1, 80, None, 3, 300),
    ]
    assert len(server.points("train_loss", "site-1")) == 3
    assert len(server.points("val_loss_local", "site-2")) == 1
    assert server.entries[-1] == RoundDone(1)


def _with(result: FLModel, losses: list[float]) -> FLModel:
    """The same with other losses of its steps."""
    steps = iter(losses)
    for point in result.meta[POINTS_KEY]:
        if point["name"] == "train_loss":
            point["value"] = next(steps)
    return result


def test_samples_of_all_sites_add_up_over_rounds(tmp_path: Path) -> None:
    server = Server(tmp_path, [Site("site-1", steps=3), Site("site-2", steps=2)])
    play(server, 2)
    assert [(p.round, p.samples, p.value) for p in server.points("val_loss")] == [(0, 0, 7.0), (1, 80, 4.0)]
    assert [p.samples for p in server.points("train_loss")] == [32, 64, 80, 112, 144, 160]


def test_samples_of_a_site_that_sits_a_round_out_still_count(tmp_path: Path) -> None:
    sites = [Site("site-1", steps=2), Site("site-2", steps=2)]
    server = Server(tmp_path, sites, min_sites=1)
    sites[1].does(TRAIN_TASK, 1, lambda _: ReturnCode.EXECUTION_EXCEPTION)
    play(server, 3)
    assert [p.samples for p in server.points("val_loss")] == [0, 64, 96]
    assert [p.samples for p in server.points("train_loss")] == [32, 64, 80, 96, 128, 160]
    assert server.state.progress.samples == {"site-1": 96, "site-2": 64}


def test_whole_job_is_in_the_journal_in_its_order(tmp_path: Path) -> None:
    server = Server(tmp_path, [Site("site-1", steps=1), Site("site-2", steps=1)])
    server.run()
    sites_own = [e for e in server.entries if isinstance(e, Progress) or (isinstance(e, Point) and e.site)]
    assert [e for e in server.entries if e not in sites_own] == [
        Started(0),
        Point("val_loss", 7.0, 0, 0),
        Point("train_loss", 8.0, 1, 32, None, 1, 200),
        RoundDone(1),
        Point("val_loss", 4.0, 1, 32),
        Point("train_loss", 8.0, 2, 64, None, 1, 200),
        RoundDone(2),
        Point("val_loss", 3.0, 2, 64),
        Point("train_loss", 8.0, 3, 96, None, 1, 200),
        RoundDone(3),
        Point("val_loss", 2.0, 3, 96),
        Finished(),
    ]
    assert server.panics == []


def test_cpu_seconds_of_the_server_are_told_with_each_score_and_go_on_in_the_next_process(tmp_path: Path) -> None:
    Server(tmp_path, [Site("site-1")], num_rounds=2).run()
    points = Server(tmp_path, [Site("site-1")], num_rounds=2).cpu_seconds
    assert [point.round for point in points] == [0, 1, 2]
    assert [point.value for point in points] == sorted(point.value for point in points)
    assert 0 < points[-1].value <= time.process_time()
    later = Server(tmp_path, [Site("site-1")], num_rounds=3)
    later.run()
    assert later.cpu_seconds[-1].value > 2 * points[0].value  # as if this process were another one


# The global model.


def test_global_model_moves_by_the_mean_change_weighted_by_tokens(tmp_path: Path) -> None:
    sites = [Site("site-1", tokens=17), Site("site-2", tokens=4_321)]
    server = Server(tmp_path, sites)
    changes = {site.name: site.train(FLModel(params=BASE, current_round=0)).params for site in sites}
    (after,) = play(server, 1)
    for name, tensor in after.items():
        parts = [changes[site.name][name].to(torch.float64).numpy() for site in sites]
        expected = BASE[name].to(torch.float64).numpy() + np.average(parts, axis=0, weights=[17, 4_321])
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("size", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("wire", "most"), [("fp32", 1e-6), ("bf16-diff", 1e-2)])
def test_what_is_added_to_the_global_model_is_the_mean_in_float64_within_what_the_wire_allows(
    tmp_path: Path, size: float, wire: str, most: float
) -> None:
    tokens = {"site-1": 17, "site-2": 100_003, "site-3": 4_321}
    changes = {site: weights(seed, size) for seed, site in enumerate(tokens)}
    travel = torch.bfloat16 if wire == "bf16-diff" else torch.float32

    def applied(start: Weights) -> Weights:
        server = Server(tmp_path, map(Site, tokens), wire=wire)
        server.global_model.weights = copied(start)
        average = TokenWeightedAverage({name: tuple(tensor.shape) for name, tensor in start.items()})
        for site, change in changes.items():
            average.add(site, {name: tensor.to(travel) for name, tensor in change.items()}, tokens[site])
        server.global_model.apply(average)
        return server.global_model.weights

    added = applied({name: torch.zeros_like(tensor) for name, tensor in BASE.items()})
    for name, tensor in added.items():
        assert tensor.dtype == torch.float32
        parts = [change[name].to(torch.float64).numpy() for change in changes.values()]
        expected = np.average(parts, axis=0, weights=list(tokens.values()))
        error = np.linalg.norm(tensor.to(torch.float64).numpy() - expected) / np.linalg.norm(expected)
        assert error <= most
    # To weights of size 1 just that is added, in float32.
    assert same(applied(BASE), {name: tensor + added[name] for name, tensor in BASE.items()})


@pytest.mark.parametrize("losses", [[7.0, 2.0, 3.0, 2.5], [7.0, 4.0, 2.0, 3.0], [7.0, 4.0, 3.0, 2.0], [0.1, 3, 2, 3]])
def test_best_model_is_the_one_that_was_scored_lowest_and_never_the_base(tmp_path: Path, losses: list[float]) -> None:
    sites = [Site("site-1"), Site("site-2")]
    models = play(Server(tmp_path / "again", [Site("site-1"), Site("site-2")]), 3)
    for site in sites:
        site.losses = losses
    server = Server(tmp_path, sites)
    server.run()
    best = min((1, 2, 3), key=losses.__getitem__)
    assert same(server.left(BEST_MODEL), models[best - 1])
    assert same(server.left(LAST_MODEL), models[2])
    assert not same(models[0], models[1])


def test_earlier_model_is_best_when_losses_are_equal(tmp_path: Path) -> None:
    site = Site("site-1")
    site.losses = [7.0, 2.0, 2.0, 2.0]
    server = Server(tmp_path, [site])
    play(server, 3)
    assert server.state.progress.best_round == 1


def test_finished_job_leaves_its_files_and_hands_them_over_once_more_if_it_is_asked_to(tmp_path: Path) -> None:
    server = Server(tmp_path, [Site("site-1")])
    server.run()
    left = {path.name: path.read_bytes() for path in (tmp_path / "job").iterdir()}
    assert sorted(left) == sorted([BEST_MODEL, JOURNAL_FILE, LAST_MODEL])
    for path in (tmp_path / "job").iterdir():
        path.unlink()  # NVFlare's server died before it had archived them
    again = Server(tmp_path, [site := Site("site-1")])
    assert (again.state.progress.finished, again.state.progress.best_round) == (3, 3)
    again.run()
    assert [task for task, _ in site.given] == [VALIDATE_TASK]  # nothing is trained, nothing released
    for name in (BEST_MODEL, LAST_MODEL):
        assert (tmp_path / "job" / name).read_bytes() == left[name]
    entries = (tmp_path / "job" / JOURNAL_FILE).read_bytes()
    assert entries.startswith(left[JOURNAL_FILE])
    more = [from_line(line) for line in entries[len(left[JOURNAL_FILE]) :].decode().splitlines()]
    assert [entry for entry in more if not isinstance(entry, Point | Progress)] == [Started(3), Finished()]


# Going on.


class _Killed(BaseException):
    pass


def _die(*_: object) -> None:
    raise _Killed


@pytest.mark.parametrize(
    ("wire", "algorithm"),
    [
        ("fp32", FedAvg()),
        ("bf16-diff", FedAvg()),
        ("fp32", FedOpt(name="fedopt")),
        ("bf16-diff", FedOpt(name="fedopt", optimizer="adam", learning_rate=0.1)),
    ],
    ids=["fp32", "bf16-diff", "momentum", "adam"],
)
@pytest.mark.parametrize("moment", ["before it commits", "after it committed", "between rounds"])
def test_killed_server_is_gone_on_from_bit_for_bit_without_doubled_points(
    tmp_path: Path, wire: str, algorithm: FedAvg | FedOpt, moment: str
) -> None:
    def sites() -> list[Site]:
        return [Site("site-1", tokens=17, wire=Wire(wire)), Site("site-2", tokens=4_321, wire=Wire(wire))]

    arguments = {"wire": wire, "algorithm": algorithm.model_dump()}
    whole = Server(tmp_path / "whole", sites(), **arguments)
    whole.run()

    killed = Server(tmp_path / "killed", sites(), **arguments)
    play(killed, 1)
    if moment == "before it commits":
        killed.state.commit_round = _die  # type: ignore[method-assign]
    elif moment == "after it committed":
        commit = killed.state.commit_round
        killed.state.commit_round = lambda *kept: _die(commit(*kept))  # type: ignore[method-assign]
    else:
        play(killed, 2)
        killed.run_round = _die  # type: ignore[method-assign]
    with pytest.raises(_Killed):
        play(killed, 3)

    again = Server(tmp_path / "killed", sites(), **arguments)
    again.run()
    assert again.of(Started) == [Started(1 if moment == "before it commits" else 2)]
    assert whole.panics == again.panics == []
    for name in (BEST_MODEL, LAST_MODEL):
        assert same(again.left(name), whole.left(name))
    points = again.of(Point)
    assert sorted(map(repr, (p.identity for p in points))) == sorted(repr(p.identity) for p in whole.of(Point))
    assert {p.identity: p for p in points} == {p.identity: p for p in whole.of(Point)}


def test_job_whose_rounds_are_all_done_is_only_scored(tmp_path: Path) -> None:
    play(Server(tmp_path, [Site("site-1")]), 3)
    site = Site("site-1")
    again = Server(tmp_path, [site])
    again.run()
    assert site.given == [(VALIDATE_TASK, Kind.FULL)]
    assert again.points("val_loss")[-1] == Point("val_loss", 2.0, 3, 144)
    assert (tmp_path / "job" / BEST_MODEL).exists()


def test_results_that_a_killed_server_kept_on_the_disk_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "state" / "results" / "of a killed server"
    site, found = Site("site-1"), list[bool]()
    server = Server(tmp_path, [site])
    left.mkdir(parents=True)
    site.does(TRAIN_TASK, 0, lambda received: found.append(left.exists()) or site.train(received))
    server.run()
    assert found == [False]


# Who gets what.


def test_change_is_sent_only_to_sites_that_hold_the_model(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}", wire=Wire.BF16_DIFF) for k in (1, 2)]
    server = Server(tmp_path, sites, wire="bf16-diff", min_sites=1)
    sites[1].does(TRAIN_TASK, 1, lambda _: ReturnCode.EXECUTION_EXCEPTION)
    server.begin()
    for number in range(3):
        server.run_round(number)
    assert [kind for _, kind in sites[0].given] == [Kind.FULL, Kind.CHANGE, Kind.CHANGE]
    assert [kind for _, kind in sites[1].given] == [Kind.FULL, Kind.CHANGE, Kind.FULL]


def test_site_that_was_away_gets_the_whole_model(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}", wire=Wire.BF16_DIFF) for k in (1, 2)]
    server = Server(tmp_path, sites, wire="bf16-diff", min_sites=1)
    server.begin()
    for number, connected in enumerate((["site-1", "site-2"], ["site-1"], ["site-1", "site-2"])):
        server.connected = connected
        server.run_round(number)
    assert [kind for _, kind in sites[1].given] == [Kind.FULL, Kind.FULL]
    assert server.of(Missed) == [Missed("site-2", 2, "it is not connected")]


def test_sites_have_the_global_model_bit_for_bit_in_every_round(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}", wire=Wire.BF16_DIFF) for k in (1, 2)]
    server = Server(tmp_path, sites, wire="bf16-diff")
    server.begin()
    for number in range(3):
        before = copied(server.global_model.weights)
        server.run_round(number)
        assert all(same(site.model, before) for site in sites)
        assert not same(server.global_model.weights, before)


def test_in_fp32_every_site_gets_the_whole_model_every_time(tmp_path: Path) -> None:
    site = Site("site-1")
    Server(tmp_path, [site]).run()
    assert site.given == [*[(TRAIN_TASK, Kind.FULL)] * 3, (VALIDATE_TASK, Kind.FULL)]


def test_job_without_a_base_model_begins_with_the_mean_of_what_sites_begin_with(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2)]
    for site in sites:
        site.does(TRAIN_TASK, 0, lambda received, site=site: site.train(received, **{FIRST_KEY: "digest"}))  # type: ignore[misc]
        for number in (1, 2):
            site.does(TRAIN_TASK, number, lambda received, site=site: site.train(received, **{FIRST_KEY: "digest"}))  # type: ignore[misc]
    server = Server(tmp_path, sites, base_model=None)
    first = [site.train(FLModel(params={}, current_round=0)).params for site in sites]
    models = play(server, 2)
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, (first[0][name] + first[1][name]) / 2)
    assert server.panics == []
    assert server.state.progress.first == "digest"


# Sites that do not answer.


def _failing(traceback: str) -> Callable[[Site], Callable[[FLModel], Answer]]:
    return lambda site: lambda _: FLModel(metrics={}, meta={FAILURE_KEY: traceback, "client_name": site.name})


@pytest.mark.parametrize(
    ("answer", "missed"),
    [
        (lambda _site: lambda _: ReturnCode.EXECUTION_EXCEPTION, "its trainer exited (EXECUTION_EXCEPTION)"),
        (_failing("Traceback: é"), "its trainer failed"),
        (lambda _site: lambda _: None, "no message for 0 s (site_timeout is 0.05 s)"),
    ],
    ids=["its trainer died", "its trainer says why it ends", "silence"],
)
def test_round_goes_on_without_a_site_as_long_as_enough_answer(
    tmp_path: Path, answer: Callable[[Site], Callable[[FLModel], Answer]], missed: str
) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, min_sites=2, site_timeout=0.05)
    sites[1].does(TRAIN_TASK, 1, answer(sites[1]))
    play(server, 2)
    (said,) = server.of(Missed)
    assert (said.site, said.round, said.reason) == ("site-2", 2, missed)
    assert said.failure == ("Traceback: é" if missed == "its trainer failed" else None)
    assert server.of(RoundDone) == [RoundDone(1), RoundDone(2)]
    assert {p.site for p in server.of(Point) if p.name == "train_loss" and p.round == 2} == {None, "site-1", "site-3"}


def test_site_that_the_server_loses_is_not_waited_for(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites, min_sites=1)  # with half an hour for a site that says nothing

    def disconnects(_: FLModel) -> None:
        context = FLContext()
        context.set_prop(FLContextKey.DISCONNECTED_CLIENT_NAME, "site-2")
        server.handle_event(EventType.CLIENT_DISCONNECTED, context)

    sites[1].does(TRAIN_TASK, 0, disconnects)
    play(server, 1)
    assert server.of(Missed) == [Missed("site-2", 1, "disconnected")]


def test_job_with_too_few_sites_ends_and_says_who_was_missing_and_that_sites_were_lost(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, min_sites=2)
    sites[0].does(TRAIN_TASK, 1, lambda _: ReturnCode.EXECUTION_EXCEPTION)
    sites[2].does(TRAIN_TASK, 1, _failing("Traceback")(sites[2]))
    server.run()
    why = "round 2 has results of 1 of 3 sites; min_sites is 2"
    assert server.entries[-3:] == [
        Missed("site-1", 2, "its trainer exited (EXECUTION_EXCEPTION)"),
        Missed("site-3", 2, "its trainer failed", "Traceback"),
        Stopped(why, lost_sites=True),
    ]
    assert server.panics == [why]
    assert server.of(RoundDone) == [RoundDone(1)]
    assert not (tmp_path / "job" / LAST_MODEL).exists()
    assert server.of(Finished) == []
    assert (tmp_path / "job" / JOURNAL_FILE).read_bytes() == server.journal.path.read_bytes()
    again = Server(tmp_path, [Site(f"site-{k}") for k in (1, 2, 3)])
    again.run()
    assert again.of(Started) == [Started(0), Started(1)]
    assert again.of(RoundDone) == [RoundDone(1), RoundDone(2), RoundDone(3)]


def test_all_sites_are_needed_unless_the_job_says_otherwise(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites)
    server.connected = ["site-1"]
    server.begin()
    with pytest.raises(NotEnoughSitesError, match="round 1 has results of 1 of 2 sites; min_sites is 2"):
        server.run_round(0)


def test_nobody_is_waited_for_when_enough_cannot_answer_any_more(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites)  # with half an hour for site-1, which is silent
    sites[0].does(TRAIN_TASK, 0, lambda _: None)
    sites[1].does(TRAIN_TASK, 0, lambda _: ReturnCode.EXECUTION_EXCEPTION)
    server.run()
    assert [one.reason for one in server.of(Missed)] == [
        "the round ended before it answered",
        "its trainer exited (EXECUTION_EXCEPTION)",
    ]
    assert server.of(Stopped)[0].lost_sites


def test_last_validation_goes_on_without_a_site_too(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites, min_sites=1)
    sites[1].does(VALIDATE_TASK, 3, lambda _: ReturnCode.EXECUTION_EXCEPTION)
    server.run()
    assert server.panics == []
    assert server.of(Missed) == []  # it has missed no round
    assert server.points("val_loss")[-1].round == 3
    assert (tmp_path / "job" / BEST_MODEL).exists()


# Sites that come, or come again. Nobody but an operator submits the job again, so that is done while one listens.

_GONE = "the site restarted and lost its part of the job"


def _listens(server: Server) -> None:
    server.hand_out_journal("", {"offset": 0}, FLContext())


def _found(server: Server, lost: Iterable[str] = (), come: Iterable[str] = ()) -> Callable[[FLModel], None]:
    """While a site has its task, looks find these sites so."""

    def silent(_: FLModel) -> None:
        for part in (Part.RUNS, Part.GONE, Part.GONE):
            found = {site: part if site in {*lost, *come} else Part.RUNS for site in server.sites}
            if part is Part.RUNS:
                found |= dict.fromkeys(come, Part.AWAY)
            server.newcomers.note(found)

    return silent


def test_round_ends_without_a_site_that_was_started_again_and_then_the_job_ends_to_be_submitted_again(
    tmp_path: Path,
) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, min_sites=2)  # with half an hour for a site that says nothing
    server.watch_presence(dict)
    _listens(server)
    sites[1].does(TRAIN_TASK, 0, _found(server, lost=["site-2"]))
    server.run()
    assert server.of(Missed) == [Missed("site-2", 1, _GONE)]
    assert server.entries[-2:] == [RoundDone(1), Regroup(["site-2"])]
    assert len(server.panics) == 1
    again = Server(tmp_path, [Site(f"site-{k}") for k in (1, 2, 3)], min_sites=2)
    again.run()
    assert again.of(RoundDone) == [RoundDone(1), RoundDone(2), RoundDone(3)]
    assert len(again.of(Missed)) == 1


def test_round_that_cannot_do_without_a_site_that_was_started_again_is_done_again_with_it(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites)
    server.watch_presence(dict)
    _listens(server)
    sites[1].does(TRAIN_TASK, 1, _found(server, lost=["site-2"]))
    server.run()
    assert server.entries[-1] == Regroup(["site-2"])
    assert server.of(Missed) == server.of(Stopped) == []
    assert server.of(RoundDone) == [RoundDone(1)]


def _ends(server: Server, looks: list[Part]) -> Callable[[FLModel], Answer]:
    """The part of site-2 ends once it was seen to run; from then on it is found so, and at last so for ever."""
    server.newcomers.times = PresenceTimes(between_polls=0.01, to_notice=0.2)
    seen, ended = threading.Event(), threading.Event()

    def look() -> dict[str, Part]:
        seen.set()
        part = (looks.pop(0) if len(looks) > 1 else looks[0]) if ended.is_set() else Part.RUNS
        return {**dict.fromkeys(server.sites, Part.RUNS), "site-2": part}

    def ends(_: FLModel) -> Answer:
        seen.wait()
        time.sleep(0.05)  # the look has been taken in
        ended.set()
        return ReturnCode.TASK_ABORTED

    server.watch_presence(look)
    _listens(server)
    return ends


def test_site_that_is_stopped_and_needed_has_time_to_start_again(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites)
    looks = [Part.RUNS, Part.GONE, *[Part.AWAY] * 40, Part.GONE]
    sites[1].does(TRAIN_TASK, 1, _ends(server, looks))
    server.run()
    assert server.entries[-1] == Regroup(["site-2"])
    assert server.of(Stopped) == []


def test_site_that_is_there_and_whose_trainer_is_gone_is_not_waited_for(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites)
    sites[1].does(TRAIN_TASK, 1, _ends(server, [Part.RUNS]))
    server.run()
    (stopped,) = server.of(Stopped)
    assert stopped.lost_sites


def test_job_goes_on_without_a_site_that_comes_while_nobody_would_submit_it_again(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites, min_sites=1)
    server.watch_presence(dict)
    sites[1].does(TRAIN_TASK, 0, _found(server, lost=["site-2"]))
    for number in (1, 2):
        sites[1].does(TRAIN_TASK, number, lambda _: None)
    server.run()
    assert [(one.round, one.reason) for one in server.of(Missed)] == [(1, _GONE), (2, _GONE), (3, _GONE)]
    assert server.of(Finished) == [Finished()]


def test_site_that_is_absent_from_the_start_is_named_at_once_and_taken_in_when_it_comes(tmp_path: Path) -> None:
    sites = [Site(f"site-{k}") for k in (1, 2, 3)]
    server = Server(tmp_path, sites, min_sites=2)
    server.connected = ["site-1", "site-2"]
    server.watch_presence(lambda: dict.fromkeys(server.sites, Part.RUNS))
    _listens(server)
    usual = sites[0].train

    def comes(received: FLModel) -> FLModel:
        _found(server, come=["site-3"])(received)
        return usual(received)

    sites[0].does(TRAIN_TASK, 1, comes)
    server.run()
    assert server.of(Progress)[0] == Progress("site-3 · not connected; the job continues without it")
    assert server.entries[-2:] == [RoundDone(2), Regroup(["site-3"])]
    again = Server(tmp_path, sites, min_sites=2)
    again.connected = ["site-1", "site-2"]  # it did not get its part
    again.watch_presence(dict)
    assert again.state.progress.sent_for == ["site-3"]
    again.connected = ["site-1", "site-2", "site-3"]
    again.watch_presence(dict)
    assert again.state.progress.sent_for == []


def test_site_whose_trainer_said_why_it_gives_up_is_not_taken_in_again(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites, min_sites=1)
    server.watch_presence(dict)
    _listens(server)

    def fails(received: FLModel) -> Answer:
        _found(server, lost=["site-2"])(received)
        return _failing("Traceback")(sites[1])(received)

    sites[1].does(TRAIN_TASK, 0, fails)
    for number in (1, 2):
        sites[1].does(TRAIN_TASK, number, lambda _: None)
    server.run()
    assert server.of(Regroup) == []
    assert server.of(Finished) == [Finished()]


# Results that are of no use.


def _other(**changes: Any) -> Callable[[Site], Callable[[FLModel], Answer]]:
    """Its usual result with other parameters or metadata."""

    def answer(site: Site) -> Callable[[FLModel], Answer]:
        def act(received: FLModel) -> FLModel:
            result = site.train(received)
            result.params.update(changes.get("params", {}))
            result.meta.update(changes.get("meta", {}))
            return result

        return act

    return answer


@pytest.mark.parametrize(
    ("ratio", "why"),
    [
        (None, "try a lower learning rate"),
        (0.5, "try a lower learning rate"),
        (
            2.0,
            "the noise in a round's mean has 2 times the norm of a clipped change: lower"
            " filters.privacy.noise_multiplier, or try a lower learning rate",
        ),
        (
            6.28e11,
            "the noise in a round's mean has 6.28e+11 times the norm of a clipped change: lower"
            " filters.privacy.noise_multiplier",
        ),
    ],
)
@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_job_whose_model_has_gone_astray_says_what_makes_it_so(
    tmp_path: Path, ratio: float | None, why: str, loss: float
) -> None:
    site = Site("site-1")
    site.losses[1:] = [loss] * 3
    server = Server(tmp_path, [site], noise_ratio=ratio)
    server.run()
    reason = f"round 2: site-1: val_loss: found {loss}, expected a finite number; {why}"
    assert server.panics == [reason]
    assert server.entries[-1] == Stopped(reason)
    noise = [entry.text for entry in server.of(Progress) if "noise" in entry.text]
    assert len(noise) == (ratio is not None and ratio > 1)
    if noise:  # and before any round
        assert server.entries[1] == Progress(noise[0])
        assert noise[0].startswith(f"the noise in a round's mean has {ratio:,.3g} times the norm of a clipped change")


def test_site_that_joins_later_must_have_begun_with_the_same_too(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    for number, digest in ((0, "a"), (1, "b")):
        sites[0].does(TRAIN_TASK, number, _other(meta={FIRST_KEY: digest})(sites[0]))
    server = Server(tmp_path, sites, min_sites=1)
    server.connected = ["site-1"]
    server.run()
    assert server.of(Stopped)[0].reason.startswith("round 2: site-1: started from a base model or adapters that")


@pytest.mark.parametrize(("content", "said"), [(None, "No such file"), ("not an archive", "file could not be opened")])
def test_base_model_that_cannot_be_read_ends_the_job_with_the_reason(
    tmp_path: Path, content: str | None, said: str
) -> None:
    archive = tmp_path / "mine.nemo"
    if content:
        archive.write_text(content)
    server = Server(tmp_path, [Site("site-1")], base_model=str(archive))
    server.run()
    (stopped,) = server.of(Stopped)
    assert said in stopped.reason
    assert not stopped.lost_sites
    assert server.panics == [stopped.reason]


def test_aborted_job_stops_without_a_reason_and_can_be_gone_on_with(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites)

    def abort(_: FLModel) -> None:
        server.abort_signal.trigger(True)

    sites[1].does(TRAIN_TASK, 1, abort)
    server.run()
    assert (server.of(Stopped), server.of(Missed), server.panics) == ([], [], [])
    assert Server(tmp_path, sites).state.progress.finished == 1


def test_aborted_job_does_not_wait_for_tasks_that_nobody_ends_any_more(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites)

    def abort(_: FLModel) -> None:
        server.abort_signal.trigger(True)
        server.cancel_all_tasks = lambda **_: None  # type: ignore[method-assign]

    sites[1].does(TRAIN_TASK, 0, abort)
    server.run()
    assert server.get_num_standing_tasks() > 0
    assert (server.of(Stopped), server.panics) == ([], [])


# While sites work.


def test_points_that_come_while_a_site_works_are_written_down_once(tmp_path: Path) -> None:
    site = Site("site-1", steps=1)
    server = Server(tmp_path, [site])
    early = Point("train_loss", 8.0, 1, 16, "site-1", 1, 100)

    def works(received: FLModel) -> FLModel:
        says(server, "site-1", "step 1", [early])
        assert server.entries == [Progress("site-1 · step 1"), early]
        return site.train(received)

    site.does(TRAIN_TASK, 0, works)
    play(server, 1)
    assert server.points("train_loss", "site-1") == [early]


def test_site_that_says_something_is_waited_for(tmp_path: Path) -> None:
    sites = [Site("site-1"), Site("site-2")]
    server = Server(tmp_path, sites, site_timeout=0.2)
    begun = time.monotonic()

    def silent_but_for_its_words(_: FLModel) -> None:
        real = server.get_num_standing_tasks

        def standing() -> int:
            says(server, "site-2", "busy")
            if time.monotonic() > begun + 0.6:
                server.abort_signal.trigger(True)
            return real()

        server.get_num_standing_tasks = standing  # type: ignore[method-assign]

    sites[1].does(TRAIN_TASK, 0, silent_but_for_its_words)
    server.run()
    assert server.of(Missed) == []  # it was the abort that ended the wait
    assert Progress("site-2 · busy") in server.entries


def test_journal_of_a_running_job_is_handed_out_from_where_the_asker_is(tmp_path: Path) -> None:
    server = Server(tmp_path, [Site("site-1")])
    server.journal.add([RoundDone(1)])
    first = server.hand_out_journal("", {"offset": 0}, FLContext())
    server.journal.add([RoundDone(2)])
    second = server.hand_out_journal("", {"offset": first["offset"]}, FLContext())
    assert [from_line(answer["text"]) for answer in (first, second)] == [RoundDone(1), RoundDone(2)]


# Where the state is.


@pytest.fixture
def placed(tmp_path: Path) -> Server:
    """A server whose engine has a workspace, with a job of an execution in it."""
    server = Server(tmp_path / "server", [Site("site-1")])
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({EXECUTION_KEY: "execution-7"}))
    server.get_workspace = lambda: SimpleNamespace(  # type: ignore[attr-defined]
        get_job_meta_path=lambda job: str(meta) if job == "job-1" else None, get_root_dir=lambda: str(tmp_path / "root")
    )
    server.fl_ctx = SimpleNamespace(get_job_id=lambda: "job-1")
    return server


def test_state_is_that_of_the_execution_whatever_the_job_id(placed: Server, tmp_path: Path) -> None:
    assert placed.state_folder() == tmp_path / "root" / "fedsft" / "execution-7"


def test_job_that_nobody_names_an_execution_for_has_a_state_of_its_own(placed: Server, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text("{}")
    assert placed.state_folder() == tmp_path / "root" / "fedsft" / "job-1"


def test_state_is_where_the_operator_wants_it(placed: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STATE_ROOT, str(tmp_path / "states"))
    assert placed.state_folder() == tmp_path / "states" / "execution-7"


def test_states_that_nobody_came_back_to_for_a_month_are_removed(placed: Server, tmp_path: Path) -> None:
    root = tmp_path / "root" / "fedsft"
    for name, days in (("execution-7", 90), ("old", 31), ("recent", 29)):
        (root / name).mkdir(parents=True)
        (root / name / "state.json").write_text("{}")
        then = time.time() - days * 24 * 3600
        os.utime(root / name, (then, then))
    placed.state_folder()
    assert sorted(path.name for path in root.iterdir()) == ["execution-7", "recent"]


def test_results_wait_on_the_disk_beside_the_state_and_only_while_the_job_runs(tmp_path: Path) -> None:
    site = Site("site-1")
    server = Server(tmp_path, [site], num_rounds=1)
    seen: list[Any] = []
    site.does(TRAIN_TASK, 0, lambda received: (seen.append(_files_for_results()), site.train(received))[1])
    server.run()
    (files,) = seen
    assert files.folder.is_relative_to(tmp_path / "state")
    assert not files.folder.exists()
    assert _files_for_results() is None


def _files_for_results() -> ReusedFiles | None:
    decomposer: StreamDecomposer = fobs.get_dot_handler(dots.TENSOR_DOWNLOAD)
    return decomposer.endpoint.files


def test_result_of_a_task_that_is_over_is_not_taken(tmp_path: Path) -> None:
    server = Server(tmp_path, [Site("site-1")])
    answer = FLModelUtils.to_shareable(FLModel(params={}, params_type=ParamsType.FULL))
    assert server._accept_train_result("site-1", answer, FLContext())
    assert not server._accept_train_result("site-1", make_reply(ReturnCode.OK), FLContext(), is_unknown_task=True)
    assert not server._accept_train_result("site-1", make_reply(ReturnCode.EXECUTION_EXCEPTION), FLContext())


def test_model_is_sent_as_it_is_not_as_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(tmp_path, [Site("site-1")])
    monkeypatch.setattr(server, "fire_event_with_data", lambda *_: None)
    task = SimpleNamespace(data=Shareable(), _broadcast_data=Shareable())
    server._prepare_task_data(SimpleNamespace(task=task, client=SimpleNamespace(name="site-1")), FLContext())
    assert task._broadcast_data is task.data


# The base model.


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
    with pytest.raises(ValueError, match=f"{path}: model_weights.ckpt is missing; is it a .nemo archive"):
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


def test_base_model_of_a_server_with_a_folder_of_its_own_is_the_one_there(tmp_path: Path) -> None:
    (tmp_path / "base_models").mkdir()
    (tmp_path / "base_models" / "tiny.nemo").write_text("")
    found = own_base_model(Path("/study/base_models/tiny.nemo"), {"FEDSFT_SITE_HOME": str(tmp_path)})
    assert found == tmp_path / "base_models" / "tiny.nemo"
    with pytest.raises(FileNotFoundError, match=r"server: /study/tiny\.nemo is missing; copy the study's base model"):
        own_base_model(Path("/study/tiny.nemo"), {})
