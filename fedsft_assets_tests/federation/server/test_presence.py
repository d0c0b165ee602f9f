"""What looks at sites say, by a clock that the tests turn."""

from collections.abc import Iterable

from fedsft_assets.federation.server.presence import Part, Presence
from fedsft_assets_tests.federation.clock import Clock

SITES = ("site-1", "site-2", "site-3")
RUNS, GONE, AWAY = Part.RUNS, Part.GONE, Part.AWAY
COMES_AGAIN = "site-2 · restarted and lost its part of the job; joins in the next round"
COMES = "site-3 · has connected; joins in the next round"
Found = tuple[list[str], list[str]]


def _looks(presence: Presence, site: str, parts: Iterable[Part], clock: Clock, seconds: float = 3.0) -> list[Found]:
    """What each look at this site says, while the others run their part."""
    found = []
    for part in parts:
        clock.now += seconds
        found.append(presence.take({**dict.fromkeys(SITES, RUNS), site: part}))
    return found


def test_site_that_was_started_again_has_lost_its_part_and_would_get_the_job(clock: Clock) -> None:
    presence = Presence(SITES, SITES)
    *before, last = _looks(presence, "site-2", [RUNS, AWAY, AWAY, GONE, GONE], clock)
    assert before == [([], [])] * 4
    assert last == ([COMES_AGAIN], ["site-2"])
    assert presence.returned == ["site-2"]
    assert _looks(presence, "site-2", [GONE, GONE], clock) == [([], [])] * 2


def test_part_that_is_not_there_in_one_look_may_be_ending(clock: Clock) -> None:
    presence = Presence(SITES, SITES)
    assert _looks(presence, "site-2", [RUNS, GONE, RUNS, GONE, RUNS], clock) == [([], [])] * 5
    assert presence.returned == []


def test_part_that_has_not_been_seen_yet_has_minutes_to_start(clock: Clock) -> None:
    presence = Presence(SITES, SITES)
    assert _looks(presence, "site-2", [GONE] * 59, clock) == [([], [])] * 59
    assert _looks(presence, "site-2", [GONE] * 2, clock) == [([], []), ([COMES_AGAIN], ["site-2"])]


def test_link_that_fails_is_told_after_a_while_and_loses_nothing(clock: Clock) -> None:
    presence = Presence(SITES, SITES)
    found = _looks(presence, "site-2", [RUNS, *[AWAY] * 30, RUNS], clock)
    told = [line for lines, _ in found for line in lines]
    assert told == ["site-2 · unreachable for 21 s", "site-2 · connected again"]
    assert [lost for _, lost in found if lost] == []
    assert presence.returned == []


def test_site_that_was_absent_when_the_job_began_comes(clock: Clock) -> None:
    presence = Presence(SITES, SITES[:2])
    assert _looks(presence, "site-3", [AWAY] * 40, clock) == [([], [])] * 40  # who is missing was told
    assert _looks(presence, "site-3", [GONE], clock) == [([COMES], [])]
    assert presence.returned == ["site-3"]


def test_site_that_came_and_left_again_is_not_waited_for(clock: Clock) -> None:
    presence = Presence(SITES, SITES[:2])
    _looks(presence, "site-3", [GONE, AWAY], clock)
    assert presence.returned == []
    assert _looks(presence, "site-3", [GONE], clock) == [([COMES], [])]


def test_site_that_did_not_get_the_job_when_it_was_submitted_for_its_sake_must_come_anew(clock: Clock) -> None:
    presence = Presence(SITES, SITES[:2], refused=["site-3"])
    assert _looks(presence, "site-3", [GONE] * 3, clock) == [([], [])] * 3
    assert presence.returned == []
    assert _looks(presence, "site-3", [AWAY, GONE], clock) == [([], []), ([COMES], [])]
