"""What a campaign does follows from its seed, reaches every target, and is told by target."""

from itertools import islice

import pytest

from fedsft_assets_tests.faults.faults import PLACES, SITE_TIMEOUT, Fault, Kind, Target, When, plan
from fedsft_assets_tests.faults.outcome import Outcome, Verdict


def _faults(runtime: str, executions: int) -> list[Fault]:
    plans = [plan(PLACES[runtime], f"7 {number}") for number in range(executions)]
    return [fault for one in plans for attempt in islice(one.attempts, 5) for fault in attempt]


@pytest.mark.parametrize("runtime", PLACES)
def test_every_target_is_hit_in_every_way_at_every_moment(runtime: str) -> None:
    faults = _faults(runtime, 400)
    assert {(fault.target, fault.kind) for fault in faults} == PLACES[runtime].faults.keys()
    moments = set(When) if any(fault.kind == Kind.ABSENCE for fault in faults) else set(When) - {When.BEFORE}
    assert {fault.when for fault in faults} == moments


def test_the_same_seed_gives_the_same_faults() -> None:
    place = PLACES["production"]
    one, again, other = (plan(place, seed) for seed in ("1 production 3", "1 production 3", "2 production 3"))
    first = list(islice(one.attempts, 8))
    assert first == list(islice(again.attempts, 8))
    assert first != list(islice(other.attempts, 8))


@pytest.mark.parametrize("runtime", PLACES)
def test_what_is_frozen_stays_so_for_longer_than_a_round_waits(runtime: str) -> None:
    assert all(fault.seconds > SITE_TIMEOUT for fault in _faults(runtime, 100) if fault.kind == Kind.FREEZE)


def test_an_absence_begins_before_anything_else_of_its_attempt() -> None:
    place = PLACES["production"].only(None, None)
    for number in range(200):
        for attempt in islice(plan(place, str(number)).attempts, 3):
            kinds = [fault.kind == Kind.ABSENCE for fault in attempt]
            assert kinds == sorted(kinds, reverse=True)


def test_a_campaign_can_be_narrowed_to_one_target() -> None:
    place = PLACES["poc"].only("server parent", "kill")
    faults = [fault for attempt in islice(plan(place, "1").attempts, 20) for fault in attempt]
    assert {(fault.target, fault.kind) for fault in faults} == {(Target.SERVER_PARENT, Kind.KILL)}
    with pytest.raises(
        ValueError, match="no stop of fork server; there are: freeze of everything, freeze of the fork server"
    ):
        PLACES["simulator"].only("fork server", "stop")


def test_totals_have_one_line_a_target() -> None:
    outcome = Outcome()
    site, worker = ("production", Target.SITE_PARENT, Kind.STOP), ("poc", Target.WORKER, Kind.KILL)
    outcome.injected.update([site, site, site, worker])
    outcome.judged.update([(site, Verdict.RECOVERED), (site, Verdict.TOO_LONG), (worker, Verdict.REFUSED)])
    _, *lines = outcome.table.splitlines()
    assert [line.split() for line in lines] == [
        ["poc", "worker", "kill", "1", "0", "1", "0", "0"],
        ["production", "site", "parent", "stop", "3", "1", "0", "0", "1"],
        ["all", "4", "1", "1", "0", "1"],
    ]
