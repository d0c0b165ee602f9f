"""Whom a round waits for, by a clock that the tests turn."""

import pytest

from fedsft_assets.federation.protocol.journal import Missed
from fedsft_assets.federation.server.liveness import SiteWatch
from fedsft_assets_tests.federation.clock import Clock

SITES = ("site-1", "site-2", "site-3")
TIMEOUT = 30.0


@pytest.fixture
def watch(clock: Clock) -> SiteWatch:  # noqa: ARG001 the watch looks at it when it is made
    watch = SiteWatch(SITES, TIMEOUT)
    watch.begin(SITES)
    for site in SITES:
        watch.heard(site)
    return watch


def test_site_that_has_said_nothing_yet_may_take_minutes_to_start(clock: Clock) -> None:
    watch = SiteWatch(SITES, TIMEOUT)
    watch.begin(SITES)
    clock.now += 299.0
    assert watch.waits(3)
    watch.heard("site-1")
    clock.now += TIMEOUT
    assert not watch.waits(1)


def test_round_waits_until_every_site_has_answered(watch: SiteWatch) -> None:
    for site in SITES:
        assert watch.waits(1)
        watch.done(site)
    assert not watch.waits(1)


def test_site_that_is_gone_is_told_with_its_reason_in_every_round(watch: SiteWatch) -> None:
    watch.gone("site-2", "it restarted")
    for number in (1, 2):
        watch.done("site-1")
        watch.done("site-3")
        assert not watch.waits(2)
        assert watch.missed("site-2", number) == Missed("site-2", number, "it restarted")
        watch.begin(SITES)
    watch.heard("site-2")
    assert watch.waits(3)


def test_site_that_speaks_is_waited_for_as_long_as_it_takes(watch: SiteWatch, clock: Clock) -> None:
    for _ in range(100):
        clock.now += TIMEOUT - 1
        watch.heard("site-2")
        assert watch.waits(1)


def test_silent_site_is_waited_for_until_its_time_is_up(watch: SiteWatch, clock: Clock) -> None:
    watch.done("site-1")
    watch.done("site-2")
    clock.now += TIMEOUT - 1
    assert watch.waits(2)
    clock.now += 1
    assert not watch.waits(2)
    assert watch.missed("site-3", 4) == Missed("site-3", 4, "no message for 30 s (site_timeout is 30 s)")


def test_round_that_cannot_have_enough_answers_any_more_waits_for_nobody(watch: SiteWatch) -> None:
    watch.done("site-1")
    watch.lost("site-2", "disconnected")
    assert watch.waits(2)
    assert not watch.waits(3)


def test_silent_sites_are_no_hope_for_enough_answers(watch: SiteWatch, clock: Clock) -> None:
    clock.now += TIMEOUT - 1
    watch.heard("site-1")
    clock.now += 1
    assert watch.waits(1)
    assert not watch.waits(2)


def test_lost_site_is_not_waited_for_and_its_first_reason_is_told(watch: SiteWatch) -> None:
    for site in SITES:
        watch.lost(site, "disconnected")
    watch.lost("site-1", "its trainer exited")
    assert not watch.waits(1)
    assert watch.missed("site-1", 2) == Missed("site-1", 2, "disconnected")


def test_site_that_is_lost_after_its_answer_has_answered(watch: SiteWatch) -> None:
    watch.done("site-1")
    watch.lost("site-1", "disconnected")
    watch.done("site-2")
    assert watch.waits(3)


def test_site_that_is_not_connected_is_not_waited_for(watch: SiteWatch) -> None:
    watch.begin(["site-1"])
    assert watch.waits(1)
    assert not watch.waits(2)
    assert watch.missed("site-2", 1) == Missed("site-2", 1, "it is not connected")


def test_site_that_comes_back_is_waited_for_in_the_next_round(watch: SiteWatch, clock: Clock) -> None:
    watch.begin(["site-1", "site-2"])
    watch.done("site-1")
    watch.done("site-2")
    clock.now += 10 * TIMEOUT
    watch.begin(SITES)
    assert not watch.waits(3)
    watch.heard("site-3")  # it takes its task
    assert watch.waits(3)


def test_site_that_is_gone_is_not_waited_for_in_any_round_until_it_is_heard_of(watch: SiteWatch) -> None:
    for number in (1, 2):
        watch.gone("site-3")
        for site in SITES[:2]:
            watch.done(site)
        assert not watch.waits(2)
        assert watch.missed("site-3", number) == Missed("site-3", number, "disconnected")
        watch.begin(SITES)
    for site in SITES[:2]:
        watch.done(site)
    assert not watch.waits(2)
    watch.heard("site-3")
    assert watch.waits(2)
    watch.begin(SITES)
    for site in SITES[:2]:
        watch.done(site)
    assert watch.waits(2)


def test_site_whose_trainer_failed_says_why_and_is_not_waited_for_again(watch: SiteWatch) -> None:
    watch.failed("site-2", "Traceback: é")
    assert watch.missed("site-2", 1) == Missed("site-2", 1, "its trainer failed", "Traceback: é")
    watch.begin(SITES)
    watch.heard("site-2")
    assert watch.waits(2)
    assert not watch.waits(3)
    assert watch.missed("site-2", 2) == Missed("site-2", 2, "its trainer failed", "Traceback: é")


def test_trainers_own_words_are_kept_when_the_site_is_lost_first(watch: SiteWatch) -> None:
    watch.lost("site-2", "its trainer exited")
    watch.failed("site-2", "Traceback")
    assert watch.missed("site-2", 1) == Missed("site-2", 1, "its trainer exited", "Traceback")


def test_sites_that_answered_were_idle_until_the_next_task_not_silent(watch: SiteWatch, clock: Clock) -> None:
    for site in SITES:
        watch.done(site)
    clock.now += 100 * TIMEOUT
    watch.begin(SITES)
    assert watch.waits(3)
    clock.now += TIMEOUT
    assert not watch.waits(1)


def test_silence_goes_on_over_the_end_of_a_round(watch: SiteWatch, clock: Clock) -> None:
    watch.done("site-1")
    watch.done("site-2")
    clock.now += TIMEOUT
    watch.begin(SITES)
    assert watch.waits(2)
    assert not watch.waits(3)
    clock.now += TIMEOUT
    assert watch.missed("site-3", 2).reason == "no message for 60 s (site_timeout is 30 s)"


def test_time_before_the_first_task_does_not_count(clock: Clock) -> None:
    late = SiteWatch(SITES, TIMEOUT)
    clock.now += 10 * TIMEOUT
    late.begin(SITES)
    assert late.waits(3)


def test_site_that_is_still_at_work_when_the_round_ends_is_told_so(watch: SiteWatch) -> None:
    watch.done("site-1")
    assert watch.missed("site-3", 7) == Missed("site-3", 7, "the round ended before it answered")


def test_strangers_change_nothing(watch: SiteWatch) -> None:
    for site in SITES:
        watch.done(site)
    watch.heard("site-9")
    watch.lost("site-9", "disconnected")
    assert not watch.waits(1)
