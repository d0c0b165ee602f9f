"""One attempt at a job, over a runtime of the test's: what is told, kept, taken over, ended and left alone."""

import json
import os
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.events import Event, JobError
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.federation.protocol.journal import (
    Entry,
    Finished,
    Missed,
    Progress,
    Regroup,
    RoundDone,
    Started,
    Stopped,
    from_line,
    to_line,
)
from fedsft_assets.federation.protocol.messages import EXECUTION_KEY
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.runtimes.interface import JobState, RefusedError, ResultLostError, UnavailableError
from fedsft_assets.federation.site.failure_log import FAILURE_MARK, TrainerFailure
from fedsft_assets.federation.supervisor import supervision
from fedsft_assets.federation.supervisor import workspace as execution_record
from fedsft_assets.federation.supervisor.failures import explain
from fedsft_assets.federation.supervisor.privacy import RELEASES_FILE, Releases
from fedsft_assets.federation.supervisor.supervision import Supervision
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.files import file_digest
from fedsft_assets.specs.job import FiltersSpec, JobSpec, PrivacySpec, SiteSpec, TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.specs.runtime import RuntimeSettings
from fedsft_assets_tests.federation.clock import Clock
from fedsft_assets_tests.federation.protocol.test_job_report import REPORT

RUNNING, DONE = JobState(False, False, "RUNNING"), JobState(True, True, "FINISHED:COMPLETED")
FAILED = JobState(True, False, "FINISHED:EXECUTION_EXCEPTION")
ABNORMAL = JobState(True, False, "FINISHED:ABNORMAL")
SITES = ["site-1", "site-2"]
VAL, LATER = Point("val_loss", 7.0, 0, 0, time=1.0), Point("val_loss", 2.0, 1, 16, time=2.0)
_SAVE_SECONDS = 5.0
DIED = "RuntimeError: trainer process exited (rc=-9) before task 'train' produced a result"


class Jobs:
    """A runtime in which one job is; each poll goes on by one step, a state and what the journal has more by then."""

    def __init__(self, outlives: bool = True) -> None:
        self.survives_submitter = outlives
        self.steps: list[tuple[JobState, list[Entry]]] = []
        self.logs: dict[str, str] = {}
        self.done: list[str] = []
        self.submissions: list[Path] = []
        self.taken: dict[str, str] = {}  # the job of each token
        self.unavailable_at = ""
        self.refuses = False
        self.missing: list[str] = []
        self.without_result: set[str] = set()
        self.without_journal = False
        self.state, self.lines = RUNNING, list[str]()
        self._handed_out = 0

    def connect(self) -> "Jobs":
        """As the next supervisor sees it."""
        self._handed_out = 0
        return self

    def lose_journal(self, kept: int = 0) -> None:
        """As a server does whose disk is another one."""
        self.lines = self.lines[:kept]

    def _do(self, what: str) -> None:
        self.done.append(what)
        if self.unavailable_at == what:
            raise UnavailableError("the server is away; start it")

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        self._do(f"gather {at_least} of {' '.join(sites)}")
        yield from self.missing

    def submit(self, job_folder: Path, token: str) -> str:
        job_id = self.taken.setdefault(token, f"job-{len(self.taken) + 1}")
        self.submissions.append(job_folder)
        self._handed_out = 0  # the journal is that of the execution, whichever job writes it
        self._do("submit")  # the job is taken, whatever becomes of the answer
        return job_id

    def poll(self, job_id: str) -> JobState:
        self._do(f"poll {job_id}")
        if self.steps:
            self.state, entries = self.steps.pop(0)
            self.lines += [to_line(entry)[:-1] for entry in entries]
        return self.state

    def new_lines(self, job_id: str) -> list[str]:  # noqa: ARG002
        if self.refuses and not self.state.ended:
            raise RefusedError("user not authorized for the action 'app_command'")
        lines, self._handed_out = self.lines[self._handed_out :], len(self.lines)
        return lines

    def journal(self, job_id: str) -> list[str] | None:  # noqa: ARG002
        return None if self.without_journal else list(self.lines)

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:  # noqa: ARG002
        return "\n".join(self.logs.get(name, "").splitlines()[-lines:])

    def abort(self, job_id: str) -> None:
        self._do(f"abort {job_id}")
        self.state = self.state if self.state.ended else ABNORMAL

    def fetch(self, job_id: str, into: Path) -> None:
        self._do(f"fetch {job_id}")
        if job_id in self.without_result:
            raise ResultLostError(f"no result of {job_id}")
        (into / "best_global_model.pt").write_text("a model")

    def close(self) -> None:
        self._do("close")


OwnClock = Callable[[float, float], Clock]


@pytest.fixture
def own_clock(monkeypatch: pytest.MonkeyPatch) -> OwnClock:
    """The clock of an attempt's own modules, which stands at some time and which each sleep moves by a step."""

    def begin(now: float, step: float) -> Clock:
        clock = Clock()
        clock.now = now

        def sleep(_: float) -> None:
            clock.now += step

        for module in (supervision, execution_record):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=clock, time=clock, sleep=sleep))
        return clock

    return begin


@pytest.fixture
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    workspace = Workspace(tmp_path / "flare" / "fedavg")
    workspace.resume_or_create({"runtime": "poc"})
    return workspace


Attempt = Callable[[], Supervision]


@pytest.fixture
def attempt(tmp_path: Path, workspace: Workspace, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """Begins another attempt to bring the same execution to its end."""
    monkeypatch.setattr(supervision, "make_runtime", lambda *_, **__: jobs.connect())
    spec = JobSpec(
        name="fedavg", description="", rounds=3, sites={site: SiteSpec(dataset="alpaca") for site in SITES}, min_sites=1
    )
    folder = tmp_path / "job_folders" / "fedavg" / "digest"
    for site in SITES:
        plan = SitePlan(
            job="fedavg",
            site=site,
            rounds=3,
            local_epochs=1,
            max_local_steps=None,
            max_evaluation_records=None,
            seed=1,
            training=PRESETS["tiny"].resolve(TrainingSpec()),
            base_model=tmp_path / "tiny.nemo",
            training_file=tmp_path / "training.jsonl",
            validation_file=tmp_path / "validation.jsonl",
            digests={},
        )
        (folder / f"app_{site}" / "config").mkdir(parents=True)
        (folder / f"app_{site}" / "config" / "plan.json").write_text(plan.model_dump_json())
    (folder / "job.json").write_text(spec.model_dump_json())
    (folder / "meta.json").write_text(json.dumps({"name": "fedavg", "min_clients": 1}))
    poc = RuntimeSettings(name="poc")
    return lambda: Supervision(JobFolder.read(folder), workspace, poc, poll_seconds=0.0, save_seconds=_SAVE_SECONDS)


def _events(one: Supervision) -> tuple[list[Event], JobError | None]:
    events = []
    try:
        for event in one.run():
            events.append(event)
    except JobError as error:
        return events, error
    return events, None


def _failure(one: Supervision) -> JobError:
    _, error = _events(one)
    assert error is not None
    return error


def test_job_is_submitted_followed_and_fetched(attempt: Attempt, jobs: Jobs, workspace: Workspace) -> None:
    missed = Missed("site-2", 2, "it is not connected")
    jobs.steps = [(RUNNING, [Started(0), VAL]), (RUNNING, [Progress("busy"), RoundDone(1), missed]), (DONE, [LATER])]
    one = attempt()
    events, error = _events(one)
    assert error is None
    assert events == [Progress("submitted FLARE job job-1 (poc)"), VAL, Progress("busy"), missed, LATER]
    assert jobs.done == ["gather 1 of site-1 site-2", "submit", *["poll job-1"] * 3, "fetch job-1"]
    assert (workspace.result / "best_global_model.pt").read_text() == "a model"
    execution = workspace.execution()
    assert execution is not None
    assert (execution.job_id, execution.rounds, execution.ended) == ("job-1", 1, False)
    assert execution.status == DONE.status
    assert list(one.history.points.values()) == [VAL, LATER]
    assert one.history.missed == [missed]


def test_submitted_job_folder_names_its_execution_and_the_users_stays_as_it_is(
    attempt: Attempt, jobs: Jobs, workspace: Workspace, tmp_path: Path
) -> None:
    jobs.steps = [(DONE, [])]
    _events(attempt())
    (submitted,) = jobs.submissions
    meta = json.loads((submitted / "meta.json").read_text())
    execution = workspace.execution()
    assert execution is not None
    assert meta == {"name": "fedavg", "min_clients": 1, EXECUTION_KEY: execution.id}
    assert EXECUTION_KEY not in (tmp_path / "job_folders" / "fedavg" / "digest" / "meta.json").read_text()
    assert (submitted / "app_site-1" / "config" / "plan.json").exists()


def test_job_id_is_kept_as_soon_as_the_job_is_submitted(attempt: Attempt, jobs: Jobs, workspace: Workspace) -> None:
    jobs.unavailable_at = "poll job-1"
    error = _failure(attempt())
    assert (str(error), error.retryable) == ("the server is away; start it", True)
    execution = workspace.execution()
    assert execution is not None
    assert execution.job_id == "job-1"


def test_job_whose_id_never_arrived_is_taken_over_and_not_submitted_twice(
    attempt: Attempt, jobs: Jobs, workspace: Workspace
) -> None:
    jobs.unavailable_at = "submit"
    assert _failure(attempt()).retryable
    execution = workspace.execution()
    assert execution is not None
    assert (execution.submissions, execution.job_id) == (1, None)
    jobs.unavailable_at = ""
    jobs.steps = [(RUNNING, [Started(0), VAL]), (DONE, [LATER])]
    assert _events(attempt()) == ([Progress("reattaching to FLARE job job-1"), VAL, LATER], None)
    assert list(jobs.taken.values()) == ["job-1"]


def test_job_whose_id_never_arrived_and_that_died_is_submitted_again(
    attempt: Attempt, jobs: Jobs, workspace: Workspace
) -> None:
    jobs.unavailable_at = "submit"
    _failure(attempt())
    jobs.unavailable_at = ""
    jobs.steps = [(FAILED, []), (DONE, [Started(0), VAL])]
    assert _events(attempt()) == ([Progress("submitted FLARE job job-2 (poc)"), VAL], None)
    execution = workspace.execution()
    assert execution is not None
    assert (execution.submissions, execution.job_id) == (2, "job-2")
    assert jobs.taken == {f"{execution.id}-1": "job-1", f"{execution.id}-2": "job-2"}


def test_job_that_dies_with_its_supervisor_is_not_asked_for(attempt: Attempt, jobs: Jobs) -> None:
    jobs.survives_submitter, jobs.unavailable_at = False, "submit"
    _failure(attempt())
    jobs.unavailable_at, jobs.steps = "", [(DONE, [Started(0)])]
    assert _events(attempt()) == ([Progress("submitted FLARE job job-2 (poc)")], None)


def test_running_job_of_an_earlier_attempt_is_taken_over_and_nothing_is_told_twice(
    attempt: Attempt, jobs: Jobs
) -> None:
    first_part: list[Entry] = [Started(0), VAL, Progress("busy"), Missed("site-2", 1, "it is not connected")]
    jobs.steps = [(RUNNING, first_part)]
    events = attempt().run()
    assert list(_until(events, 4)) == [Progress("submitted FLARE job job-1 (poc)"), *first_part[1:]]
    events.close()  # type: ignore[attr-defined]

    jobs.done.clear()
    jobs.steps = [(RUNNING, []), (DONE, [RoundDone(1), LATER])]
    again = attempt()
    events_again, error = _events(again)
    assert error is None
    assert events_again == [Progress("reattaching to FLARE job job-1"), LATER]
    assert "submit" not in jobs.done
    assert list(again.history.points.values()) == [VAL, LATER]
    assert [one.site for one in again.history.missed] == ["site-2"]
    assert not any(done.startswith("abort") for done in jobs.done)


def _until(events: object, count: int) -> Generator[Event]:
    for _ in range(count):
        yield next(events)  # type: ignore[call-overload]


def test_job_that_ended_well_meanwhile_is_fetched(attempt: Attempt, jobs: Jobs, workspace: Workspace) -> None:
    execution = workspace.execution()
    assert execution is not None
    workspace.save(replace(execution, submissions=1, job_id="job-9"))
    jobs.steps = [(DONE, [Started(0), VAL])]
    events, error = _events(attempt())
    assert (events, error) == ([Progress("reattaching to FLARE job job-9"), VAL], None)
    assert jobs.done[-1] == "fetch job-9"


def test_running_job_of_another_job_folder_is_ended_first(attempt: Attempt, jobs: Jobs, workspace: Workspace) -> None:
    assert workspace.resume_or_create({"runtime": "poc", "job_folder": "changed"}, ["job-9"]).superseded == ["job-9"]
    jobs.steps = [(RUNNING, []), (DONE, [Started(0), VAL])]
    events, error = _events(attempt())
    assert error is None
    assert events == [
        Progress("ending FLARE job job-9 of another execution"),
        Progress("submitted FLARE job job-1 (poc)"),
        VAL,
    ]
    assert jobs.done[1:4] == ["poll job-9", "abort job-9", "submit"]
    ended = workspace.execution()
    assert ended is not None
    assert ended.superseded == []
    workspace.end()
    assert workspace.resume_or_create({"runtime": "poc"}).superseded == []


def test_job_whose_result_is_lost_is_submitted_once_more_for_its_server_to_hand_it_over(
    attempt: Attempt, jobs: Jobs, workspace: Workspace
) -> None:
    first = workspace.execution()
    jobs.without_result = {"job-1"}
    jobs.steps = [(FAILED, [Started(0), VAL, RoundDone(3), LATER, Finished()])]  # as its server's parent dies then
    jobs.steps += [(FAILED, []), (DONE, [Started(3), Finished()])]
    one = attempt()
    events, error = _events(one)
    assert error is None
    assert events[-3:] == [
        Progress("no result of job-1; resubmitting the job to recover the result"),
        Progress("resuming after round 3 of 3"),
        Progress("submitted FLARE job job-2 (poc)"),
    ]
    assert jobs.done[-1] == "fetch job-2"
    assert list(one.history.points.values()) == [VAL, LATER]
    assert first is not None
    assert {meta_execution(folder) for folder in jobs.submissions} == {first.id}


def meta_execution(submitted: Path) -> str:
    return str(json.loads((submitted / "meta.json").read_text())[EXECUTION_KEY])


# A history is one unbroken chain.


@pytest.mark.parametrize("again", [False, True], ids=["at once", "by the next attempt"])
def test_job_that_has_finished_is_finished_however_nvflare_says_that_it_ended(
    attempt: Attempt, jobs: Jobs, workspace: Workspace, again: bool
) -> None:
    jobs.steps = [(RUNNING, [Started(0), VAL, RoundDone(3)])]
    if again:
        list(_until(attempt().run(), 2))
    jobs.steps += [(ABNORMAL, [LATER, Finished()])]
    one = attempt()
    _, error = _events(one)
    assert error is None
    assert jobs.done[-1] == "fetch job-1"
    assert list(jobs.taken.values()) == ["job-1"]
    execution = workspace.execution()
    assert execution is not None
    assert execution.status == ABNORMAL.status
    assert list(one.history.points.values()) == [VAL, LATER]


def test_finished_job_that_does_not_end_is_ended_and_fetched(attempt: Attempt, jobs: Jobs, own_clock: OwnClock) -> None:
    own_clock(0.0, 20.0)
    jobs.steps = [(RUNNING, [Started(0), VAL, RoundDone(3), Finished()]), *[(RUNNING, [])] * 2]
    jobs.steps += [(JobState(True, False, "FINISHED:ABORTED"), [])]
    events, error = _events(attempt())
    assert error is None
    assert events[-1] == Progress("FLARE job job-1 has finished but does not exit; aborting it")
    assert jobs.done[-3:] == ["abort job-1", "poll job-1", "fetch job-1"]


@pytest.mark.parametrize("journal", ["it is another one", "it goes on with rounds that are lost"])
def test_server_that_begins_from_zero_begins_another_history_and_none_of_it_is_taken_for_the_first(
    attempt: Attempt, jobs: Jobs, workspace: Workspace, journal: str
) -> None:
    first = workspace.execution()
    assert first is not None
    jobs.steps = [(RUNNING, [Started(0), VAL, RoundDone(1), LATER, RoundDone(2)])]
    list(_until(attempt().run(), 3))
    if journal == "it is another one":
        jobs.lose_journal()
    second = [Started(0), replace(VAL, value=7.5, time=9.0), RoundDone(1), replace(LATER, value=2.5)]
    jobs.steps = [(FAILED, []), (RUNNING, second)]
    events, error = _events(attempt())
    assert error is not None
    assert error.retryable
    begun = workspace.execution()
    assert begun is not None
    assert begun.id != first.id
    assert (begun.submissions, begun.rounds, begun.seconds, begun.superseded) == (0, 0, 0.0, ["job-2"])
    assert str(error).startswith(f"history {first.id} cannot continue: its server ")
    assert str(error).endswith(f"; the next attempt starts history {begun.id} from round zero")
    assert [event for event in events if isinstance(event, Point)] == []
    assert "abort job-2" in jobs.done

    jobs.lose_journal()
    jobs.steps = [(FAILED, []), (DONE, [*second, RoundDone(2), RoundDone(3), Finished()])]
    one = attempt()
    events, none = _events(one)
    assert none is None
    assert meta_execution(jobs.submissions[-1]) == begun.id
    assert [event for event in events if isinstance(event, Point)] == [second[1], second[3]]
    assert [point.value for point in one.history.points.values()] == [7.5, 2.5]
    assert [from_line(line) for line in workspace.journal.read_text().splitlines()][:2] == second[:2]


def test_history_whose_copy_is_lost_still_knows_its_finished_rounds(
    attempt: Attempt, jobs: Jobs, workspace: Workspace
) -> None:
    jobs.steps = [(RUNNING, [Started(0), VAL, RoundDone(1)])]
    list(_until(attempt().run(), 2))
    execution = workspace.execution()
    assert execution is not None
    workspace.save(replace(execution, rounds=1))
    workspace.journal.unlink()
    jobs.lose_journal()
    jobs.steps = [(RUNNING, [Started(0)])]
    assert "its server resumed after round 0, though it had finished round 1" in str(_failure(attempt()))


def test_points_after_the_last_round_that_a_server_lost_with_its_power_do_not_break_the_chain(
    attempt: Attempt, jobs: Jobs, workspace: Workspace
) -> None:
    jobs.steps = [(RUNNING, [Started(0), VAL, RoundDone(1), Progress("busy")])]
    list(_until(attempt().run(), 3))
    first = workspace.execution()
    jobs.lose_journal(kept=3)
    jobs.steps = [(FAILED, []), (DONE, [Started(1), LATER, RoundDone(3), Finished()])]
    one = attempt()
    assert _events(one)[1] is None
    assert list(one.history.points.values()) == [VAL, LATER]
    last = workspace.execution()
    assert first is not None
    assert last is not None
    assert last.id == first.id


@pytest.mark.parametrize("outlives", [True, False], ids=["it failed meanwhile", "it died with its supervisor"])
def test_job_that_is_gone_is_submitted_again_and_goes_on(
    attempt: Attempt, jobs: Jobs, workspace: Workspace, outlives: bool
) -> None:
    jobs.survives_submitter = outlives
    execution = workspace.execution()
    assert execution is not None
    workspace.save(replace(execution, submissions=1, job_id="job-9", rounds=2))
    jobs.steps = [(FAILED, [])] if outlives else []
    jobs.steps += [(DONE, [Started(2), RoundDone(3), LATER])]
    events, error = _events(attempt())
    assert error is None
    assert events == [Progress("resuming after round 2 of 3"), Progress("submitted FLARE job job-1 (poc)"), LATER]
    assert ("poll job-9" in jobs.done) == outlives


def test_result_that_is_here_already_is_not_fetched_again(attempt: Attempt, jobs: Jobs) -> None:
    jobs.steps = [(DONE, [Started(0), VAL, Missed("site-2", 1, "it is not connected"), LATER])]
    _events(attempt())
    jobs.done.clear()
    again = attempt()
    assert _events(again) == ([Progress("already finished; using its stored result")], None)
    assert jobs.done == []
    assert list(again.history.points.values()) == [VAL, LATER]
    assert [one.round for one in again.history.missed] == [1]


def test_seconds_are_those_of_all_attempts_also_of_one_that_was_killed(
    attempt: Attempt, jobs: Jobs, workspace: Workspace, own_clock: OwnClock
) -> None:
    clock = own_clock(1000.0, 2.0)
    jobs.steps = [(RUNNING, [VAL]), *[(RUNNING, [])] * 4, (RUNNING, [LATER])]
    events = attempt().run()
    assert list(_until(events, 3))[-1] == LATER  # after 10 seconds; nobody asks it for anything any more
    execution = workspace.execution()
    assert execution is not None
    assert 10.0 - _SAVE_SECONDS <= execution.seconds <= 10.0

    clock.now = 5.0  # another machine, on another day
    jobs.steps = [(RUNNING, []), (RUNNING, []), (DONE, [])]
    assert _events(attempt())[1] is None
    ended = workspace.execution()
    assert ended is not None
    assert ended.seconds == execution.seconds + 2.0


def test_checkpoint_that_an_earlier_attempt_made_is_told_as_it_was_unless_it_is_another_one_now(
    attempt: Attempt, workspace: Workspace, tmp_path: Path
) -> None:
    into = tmp_path / "checkpoint"
    into.mkdir()
    (into / MODEL_FILE).write_text("an archive")
    REPORT.write(into)
    assert attempt().finished(into) is None
    execution = workspace.execution()
    assert execution is not None
    workspace.save(replace(execution, checkpoint=file_digest(into / MODEL_FILE)))
    assert attempt().finished(into) == REPORT
    (into / MODEL_FILE).write_text("another archive")
    assert attempt().finished(into) is None
    (into / MODEL_FILE).unlink()
    assert attempt().finished(into) is None


def test_point_that_comes_twice_is_told_once(attempt: Attempt, jobs: Jobs, workspace: Workspace) -> None:
    jobs.steps = [(RUNNING, [Started(0), VAL]), (DONE, [Started(0), replace(VAL, value=6.9)])]
    events, _ = _events(attempt())
    assert [event for event in events if isinstance(event, Point)] == [VAL]
    kept = [from_line(line) for line in workspace.journal.read_text().splitlines()]
    assert kept == [Started(0), VAL, Started(0)]


def test_sites_that_were_missed_in_a_round_that_is_done_again_do_not_count(attempt: Attempt, jobs: Jobs) -> None:
    lost = [Missed("site-1", 1, "gone"), Missed("site-2", 2, "gone")]
    jobs.steps = [(DONE, [Started(0), lost[0], RoundDone(1), lost[1], Started(1), RoundDone(2)])]
    one = attempt()
    _events(one)
    assert one.history.missed == [lost[0]]


# What left the sites with noise.


@pytest.fixture
def private(attempt: Attempt, tmp_path: Path) -> Releases:  # noqa: ARG001
    """The same job, with noise; the record of releases."""
    spec_file = tmp_path / "job_folders" / "fedavg" / "digest" / "job.json"
    spec = JobSpec.model_validate_json(spec_file.read_text())
    filters = FiltersSpec(privacy=PrivacySpec(clip=1.0, noise_multiplier=2.0))
    spec_file.write_text(spec.model_copy(update={"filters": filters}).model_dump_json())
    return Releases(tmp_path / RELEASES_FILE)


def _counts(releases: Releases) -> list[int]:
    return [count for _, count in releases.of("site-1", "alpaca")]


def test_each_round_is_a_release_and_each_that_was_cut_off_is_one_more(
    attempt: Attempt, jobs: Jobs, private: Releases
) -> None:
    jobs.steps = [
        (FAILED, [Started(0), VAL, RoundDone(1)]),
        (FAILED, []),
        (FAILED, [Started(1), RoundDone(2), RoundDone(3)]),  # it dies while the last model is scored
        (FAILED, []),
        (DONE, [Started(3), Finished()]),
    ]
    assert _events(attempt())[1] is None
    assert _counts(private) == [4]


def test_round_that_a_server_saved_and_died_before_it_wrote_down_is_done_once(
    attempt: Attempt, jobs: Jobs, private: Releases
) -> None:
    jobs.steps = [(FAILED, [Started(0), VAL, RoundDone(1)]), (FAILED, [])]
    jobs.steps += [(DONE, [Started(2), RoundDone(3), LATER, Finished()])]
    one = attempt()
    assert _events(one)[1] is None
    assert one.history.rounds == 3
    assert _counts(private) == [3]


def test_releases_are_charged_before_they_can_happen_and_settled_when_the_job_has_said_all(
    attempt: Attempt, jobs: Jobs, private: Releases
) -> None:
    jobs.unavailable_at = "submit"
    assert _failure(attempt()).retryable
    assert _counts(private) == [3]
    jobs.unavailable_at, jobs.steps = "", [(RUNNING, [Started(0), VAL, RoundDone(1)])]
    list(_until(attempt().run(), 2))
    assert _counts(private) == [3]
    jobs.steps = [(FAILED, [Stopped("found 0 tokens")])]  # in the middle of round 2
    assert str(_failure(attempt())) == "found 0 tokens"
    assert _counts(private) == [2]


def test_releases_of_a_history_that_cannot_go_on_count_for_ever(
    attempt: Attempt, jobs: Jobs, private: Releases
) -> None:
    jobs.steps = [(RUNNING, [Started(0), VAL, RoundDone(1), RoundDone(2)])]
    list(_until(attempt().run(), 2))
    jobs.lose_journal()
    jobs.steps = [(FAILED, []), (RUNNING, [Started(0), replace(VAL, time=9.0)])]
    assert _failure(attempt()).retryable
    jobs.lose_journal()
    jobs.steps = [(FAILED, []), (DONE, [Started(0), RoundDone(3), Finished()])]
    assert _events(attempt())[1] is None
    # Of the first, two rounds, the third that was cut off, and the one that its server began from zero.
    assert _counts(private) == [4, 1]


def test_rounds_of_a_broken_history_that_were_not_read_before_it_was_ended_count(
    attempt: Attempt, jobs: Jobs, private: Releases, monkeypatch: pytest.MonkeyPatch
) -> None:
    abort = Jobs.abort

    def goes_on_until_then(own: Jobs, job_id: str) -> None:
        if not own.state.ended:
            own.lines += [to_line(entry)[:-1] for entry in (RoundDone(1), RoundDone(2))]
        abort(own, job_id)

    jobs.steps = [(RUNNING, [Started(0), RoundDone(1), VAL])]
    list(_until(attempt().run(), 2))
    jobs.lose_journal()
    jobs.steps = [(FAILED, []), (RUNNING, [Started(0), replace(VAL, time=9.0)])]
    monkeypatch.setattr(Jobs, "abort", goes_on_until_then)
    assert _failure(attempt()).retryable
    assert _counts(private)[0] == 2 + 3  # a round and one that was cut off; two and one that was cut off
    jobs.lose_journal()
    jobs.without_journal = True
    jobs.steps = [(FAILED, []), (RUNNING, [Started(0), RoundDone(1), VAL])]
    list(_until(attempt().run(), 2))
    jobs.lose_journal()
    jobs.steps = [(FAILED, []), (RUNNING, [Started(0), replace(VAL, time=9.0)])]
    assert _failure(attempt()).retryable
    assert _counts(private)[1] >= 2 + 3  # what cannot be read is taken to be all that could be


def test_rounds_that_a_stopped_job_cannot_do_any_more_are_not_charged(
    attempt: Attempt, jobs: Jobs, private: Releases
) -> None:
    jobs.survives_submitter = False
    jobs.steps = [(RUNNING, [Started(0), VAL, RoundDone(1)])]
    events = attempt().run()
    list(_until(events, 2))
    assert _counts(private) == [3]
    jobs.lines.append(to_line(RoundDone(2))[:-1])  # which nobody has read when it is stopped
    events.close()  # type: ignore[attr-defined]
    assert _counts(private) == [3]  # two, and one that was cut off
    jobs.steps = [(RUNNING, [Started(2), replace(LATER, round=2)])]
    events = attempt().run()
    list(_until(events, 3))
    events.close()  # type: ignore[attr-defined]
    assert _counts(private) == [4]


def test_job_that_is_stopped_in_its_first_round_of_three_has_released_once(
    attempt: Attempt, jobs: Jobs, private: Releases
) -> None:
    jobs.survives_submitter = False
    jobs.steps = [(RUNNING, [Started(0), VAL])]
    events = attempt().run()
    list(_until(events, 2))
    events.close()  # type: ignore[attr-defined]
    assert _counts(private) == [1]


def test_nothing_is_taken_back_of_a_stopped_job_whose_journal_nobody_has(
    attempt: Attempt, jobs: Jobs, private: Releases
) -> None:
    jobs.survives_submitter, jobs.without_journal = False, True
    jobs.steps = [(RUNNING, [Started(0), VAL])]
    events = attempt().run()
    list(_until(events, 2))
    events.close()  # type: ignore[attr-defined]
    assert _counts(private) == [3]


def test_copy_of_a_journal_that_is_lost_takes_nothing_back(
    attempt: Attempt, jobs: Jobs, private: Releases, workspace: Workspace
) -> None:
    jobs.survives_submitter = False
    jobs.steps = [(FAILED, [Started(0)]), (FAILED, [Started(0)]), (FAILED, [Started(0)])]
    assert _failure(attempt()).retryable
    assert _counts(private) == [3]
    workspace.journal.unlink()
    jobs.unavailable_at = "submit"
    assert _failure(attempt()).retryable
    assert _counts(private) == [3]


# Failures.


def test_job_that_its_server_stopped_fails_with_the_servers_reason_for_good(attempt: Attempt, jobs: Jobs) -> None:
    jobs.steps = [(FAILED, [Started(0), Stopped("round 1: site-2: found 0 tokens")])]
    error = _failure(attempt())
    assert (str(error), error.retryable) == ("round 1: site-2: found 0 tokens", False)
    assert "fetch job-1" not in jobs.done


def test_job_that_a_policy_does_not_let_run_is_not_started_again(attempt: Attempt, jobs: Jobs) -> None:
    said = "FINISHED:FAILED_TO_RUN (site-2: BYOC not permitted)"
    jobs.steps = [(JobState(ended=True, succeeded=False, status=said, forbidden=True), [])]
    error = _failure(attempt())
    assert not error.retryable
    assert str(error).startswith(f"FLARE job job-1 is not authorized: {said}; see local/authorization.json")


def test_job_that_stopped_did_not_succeed_whatever_the_runtime_says(attempt: Attempt, jobs: Jobs) -> None:
    jobs.steps = [(DONE, [Started(0), Stopped("round 1: why")])]
    assert str(_failure(attempt())) == "round 1: why"


def test_job_without_a_last_word_is_lost_and_shows_the_end_of_the_servers_log(attempt: Attempt, jobs: Jobs) -> None:
    jobs.steps = [(FAILED, [Started(0)])]  # as are the next two
    jobs.logs["server"] = "".join(f"line {k}\n" for k in range(100)) + "MemoryError"
    error = _failure(attempt())
    assert error.retryable
    assert str(error).startswith(
        "FLARE job job-3 ended early: FINISHED:EXECUTION_EXCEPTION\nThe end of the server's log:\nline 61\n"
    )
    assert str(error).endswith("\nMemoryError")


def test_last_word_of_an_earlier_attempt_is_not_that_of_the_next_one(attempt: Attempt, jobs: Jobs) -> None:
    jobs.steps = [(FAILED, [Started(0), Stopped("round 1: why")])]
    _failure(attempt())
    jobs.steps = [(FAILED, []), (FAILED, [])]  # no new server even begins
    error = _failure(attempt())
    assert error.retryable
    assert " ended early: " in str(error)


def test_server_that_dies_is_started_again_and_nothing_is_told_twice(
    attempt: Attempt, jobs: Jobs, workspace: Workspace
) -> None:
    missed = Missed("site-2", 1, "it is not connected")
    jobs.steps = [
        (FAILED, [Started(0), VAL, Progress("busy"), missed, RoundDone(1)]),
        (FAILED, []),  # the next attempt looks whether it has ended
        (RUNNING, [Started(1)]),
        (DONE, [LATER]),
    ]
    one = attempt()
    events, error = _events(one)
    assert error is None
    assert events == [
        Progress("submitted FLARE job job-1 (poc)"),
        *(VAL, Progress("busy"), missed),
        Progress("FLARE job job-1 failed: its server died (FINISHED:EXECUTION_EXCEPTION); restarting"),
        Progress("resuming after round 1 of 3"),
        Progress("submitted FLARE job job-2 (poc)"),
        LATER,
    ]
    assert one.history.missed == [missed]
    kept = [from_line(line) for line in workspace.journal.read_text().splitlines()]
    assert kept == [Started(0), VAL, Progress("busy"), missed, RoundDone(1), Started(1), LATER]


STOPPED = Stopped("round 2 has results of 0 of 2 sites; min_sites is 1", lost_sites=True)


def test_job_that_ends_for_sites_that_have_come_is_submitted_again_as_often_as_it_gets_on(
    attempt: Attempt, jobs: Jobs, workspace: Workspace
) -> None:
    ended = (FAILED, [Regroup(["site-2"])])
    for number in range(5):
        jobs.steps += [(RUNNING, [Started(number), RoundDone(number + 1)]), ended, (FAILED, [])]
    jobs.steps += [(RUNNING, [Started(5)]), (DONE, [Finished()])]
    events, error = _events(attempt())
    assert error is None
    texts = [event.text for event in events if isinstance(event, Progress)]
    assert "resubmitting FLARE job job-1 to include site-2" in texts
    assert jobs.done.count("submit") == 6
    assert jobs.done.count("abort job-1") >= 1
    execution = workspace.execution()
    assert execution
    assert execution.status == DONE.status


def test_job_that_ends_for_sites_again_and_again_and_gets_nowhere_fails(attempt: Attempt, jobs: Jobs) -> None:
    for _ in range(3):
        jobs.steps += [(RUNNING, [Started(0)]), (FAILED, [Regroup(["site-2"])]), (FAILED, [])]
    error = _failure(attempt())
    assert jobs.done.count("submit") == 3
    assert error.retryable


def test_who_is_missing_is_told_before_the_job_is_submitted(attempt: Attempt, jobs: Jobs) -> None:
    jobs.missing = ["without site-2 for now, which takes part once it is there: not connected"]
    jobs.steps = [(DONE, [Started(0), Finished()])]
    events, _ = _events(attempt())
    assert events[0] == Progress(jobs.missing[0])


def test_trainers_own_traceback_is_shown_and_another_attempt_would_not_help(attempt: Attempt, jobs: Jobs) -> None:
    missed = [Missed("site-1", 2, "its trainer failed", "Traceback: é"), Missed("site-2", 2, "it is not connected")]
    jobs.steps = [(FAILED, [Started(0), Missed("site-2", 1, "an earlier reason"), RoundDone(1), *missed, STOPPED])]
    error = _failure(attempt())
    assert not error.retryable
    assert str(error) == (f"{STOPPED.reason}\nthe trainer of site-1 failed:\nTraceback: é\nsite-2: it is not connected")


def test_trainers_traceback_is_found_in_its_sites_log_too(attempt: Attempt, jobs: Jobs) -> None:
    jobs.steps = [(FAILED, [Started(0), Missed("site-1", 2, "its trainer exited (EXECUTION_EXCEPTION)"), STOPPED])]
    jobs.logs["site-1"] = f"loading\n{FAILURE_MARK}{json.dumps('Traceback: é')}\n{DIED}\n"
    error = _failure(attempt())
    assert not error.retryable
    assert str(error) == f"{STOPPED.reason}\nthe trainer of site-1 failed:\nTraceback: é"


def test_trainer_that_was_killed_is_shown_with_its_sites_log_and_may_be_tried_again(
    attempt: Attempt, jobs: Jobs
) -> None:
    jobs.steps = [(FAILED, [Started(0), Missed("site-1", 2, "its trainer exited (EXECUTION_EXCEPTION)"), STOPPED])]
    jobs.logs["site-1"] = f"loading\n{DIED}\n"
    error = _failure(attempt())
    assert error.retryable
    assert "the trainer of site-1 failed:\nthe trainer process was killed by signal 9 (SIGKILL)" in str(error)
    assert str(error).endswith(f"The end of the site's log:\nloading\n{DIED}")


def test_job_that_is_taken_over_with_a_trainer_that_was_killed_before_is_started_again(
    attempt: Attempt, jobs: Jobs
) -> None:
    killed = Missed("site-1", 2, "its trainer exited (EXECUTION_EXCEPTION)")
    jobs.logs["site-1"] = f"loading\n{DIED}\n"
    jobs.steps = [(RUNNING, [Started(0), VAL, RoundDone(1)])]
    list(_until(attempt().run(), 2))
    jobs.steps = [(RUNNING, []), (FAILED, [killed, STOPPED]), (FAILED, []), (DONE, [Started(1), LATER])]
    assert _events(attempt()) == (
        [
            Progress("reattaching to FLARE job job-1"),
            killed,
            Progress(f"FLARE job job-1 failed: {STOPPED.reason}; restarting"),
            Progress("resuming after round 1 of 3"),
            Progress("submitted FLARE job job-2 (poc)"),
            LATER,
        ],
        None,
    )


def test_job_that_is_taken_over_and_whose_trainer_fails_by_itself_fails_for_good(attempt: Attempt, jobs: Jobs) -> None:
    jobs.steps = [(RUNNING, [Started(0), VAL])]
    list(_until(attempt().run(), 2))
    jobs.steps = [(RUNNING, []), (FAILED, [Missed("site-1", 1, "its trainer failed", "Traceback: é"), STOPPED])]
    assert not _failure(attempt()).retryable
    assert list(jobs.taken.values()) == ["job-1"]


@pytest.mark.parametrize("state", [RUNNING, DONE, FAILED], ids=lambda state: state.status)
def test_job_that_its_server_stopped_is_not_taken_over(attempt: Attempt, jobs: Jobs, state: JobState) -> None:
    jobs.steps = [(FAILED, [Started(0), VAL, STOPPED])]
    assert _failure(attempt()).retryable
    jobs.steps = [(state, []), (DONE, [Started(0), LATER])]
    assert _events(attempt()) == ([Progress("submitted FLARE job job-2 (poc)"), LATER], None)
    assert jobs.done.index("abort job-1") < jobs.done.index("fetch job-2")


def test_last_word_of_an_earlier_job_does_not_keep_the_next_one_from_being_taken_over(
    attempt: Attempt, jobs: Jobs
) -> None:
    jobs.steps = [(FAILED, [Started(0), VAL, STOPPED])]
    _failure(attempt())
    jobs.steps = [(FAILED, []), (RUNNING, [])]
    list(_until(attempt().run(), 1))  # of a supervisor that is killed before it hears anything of the new job
    jobs.done.clear()
    jobs.steps = [(DONE, []), (DONE, [Started(0), LATER])]
    assert _events(attempt()) == ([Progress("reattaching to FLARE job job-2"), LATER], None)
    assert "submit" not in jobs.done


def test_site_that_went_silent_is_told_with_the_servers_reason(attempt: Attempt, jobs: Jobs) -> None:
    jobs.steps = [(FAILED, [Started(0), Missed("site-1", 2, "no message for 30 s"), STOPPED])]
    error = _failure(attempt())
    assert (str(error), error.retryable) == (f"{STOPPED.reason}\nsite-1: no message for 30 s", True)


@pytest.mark.parametrize("quiet", ["refused", "waiting"])
def test_only_silence_is_silence(attempt: Attempt, jobs: Jobs, own_clock: OwnClock, quiet: str) -> None:
    own_clock(0.0, 1000.0)
    state = replace(RUNNING, status="SUBMITTED (connected sites (1) < min_sites (2))", waiting=quiet == "waiting")
    jobs.refuses, jobs.steps = quiet == "refused", [(state, [])] * 20
    events = attempt().run()
    told = list(_until(events, 2))
    refusal = "user not authorized for the action 'app_command'; no progress is available until the job has ended"
    assert told[-1] == Progress(refusal if quiet == "refused" else f"FLARE job job-1 is waiting: {state.status}")
    jobs.steps = [*jobs.steps, (DONE, [Started(0), VAL])]
    assert list(events) == [VAL]  # it is said once


def test_job_whose_server_cannot_be_reached_is_left_alone(attempt: Attempt, jobs: Jobs) -> None:
    jobs.unavailable_at = "poll job-1"
    assert _failure(attempt()).retryable
    assert "abort job-1" not in jobs.done
    jobs.unavailable_at, jobs.steps = "", [(RUNNING, [Started(0)]), (DONE, [VAL])]
    assert _events(attempt())[0] == [Progress("reattaching to FLARE job job-1"), VAL]


def test_job_in_which_nothing_happens_any_more_is_ended(attempt: Attempt, jobs: Jobs, own_clock: OwnClock) -> None:
    one = attempt()
    own_clock(0.0, 1000.0)
    jobs.steps = [(RUNNING, [Started(0)]), (RUNNING, []), (RUNNING, [Progress("busy")])]
    error = _failure(one)  # site_timeout is 1800 s; the server has twice as long
    assert error.retryable
    assert str(error) == "FLARE job job-1: no message from server or sites for 4000 s"
    assert jobs.done[-1] == "abort job-1"


# How a supervisor ends.


@pytest.mark.parametrize("outlives", [True, False])
def test_supervisor_that_nobody_listens_to_ends_only_a_job_that_cannot_live_without_it(
    attempt: Attempt, jobs: Jobs, outlives: bool
) -> None:
    jobs.survives_submitter = outlives
    jobs.steps = [(RUNNING, [Started(0), VAL])]
    events = attempt().run()
    list(_until(events, 2))
    events.close()  # type: ignore[attr-defined]
    assert ("abort job-1" in jobs.done) == (not outlives)


@pytest.mark.parametrize("outlives", [True, False])
def test_supervisor_whose_starter_is_gone_ends_only_a_job_that_cannot_live_without_it(
    attempt: Attempt, jobs: Jobs, outlives: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.survives_submitter = outlives
    jobs.steps = [(RUNNING, [Started(0), VAL])]
    events = attempt().run()
    list(_until(events, 2))
    monkeypatch.setattr(os, "getppid", lambda: -1)  # not 1, which may be the parent of this process
    with pytest.raises(supervision.OrphanedError):
        next(events)
    assert ("abort job-1" in jobs.done) == (not outlives)


def _stopped(*_: object) -> NoReturn:
    """What the signal handler of the supervisor does."""
    sys.exit(143)


def test_supervisor_that_is_told_to_stop_ends_the_job(
    attempt: Attempt, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = attempt().run()
    next(events)
    monkeypatch.setattr(jobs, "poll", _stopped)
    with pytest.raises(SystemExit) as stop:
        next(events)
    assert stop.value.code == 143
    assert jobs.done[-1] == "abort job-1"


def test_supervisor_that_is_told_to_stop_while_it_submits_ends_the_job_too(
    attempt: Attempt, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, answers = jobs.submit, iter([False, True])

    def interrupted(job_folder: Path, token: str) -> str:
        job_id = submit(job_folder, token)
        return job_id if next(answers) else _stopped()

    monkeypatch.setattr(jobs, "submit", interrupted)
    with pytest.raises(SystemExit):
        next(attempt().run())
    assert list(jobs.taken.values()) == ["job-1"]
    assert jobs.done[-1] == "abort job-1"


def test_supervisor_that_is_told_to_stop_before_it_takes_over_ends_the_job_too(
    attempt: Attempt, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.steps = [(RUNNING, [Started(0), VAL])]
    events = attempt().run()
    list(_until(events, 2))
    events.close()  # type: ignore[attr-defined]
    again = attempt()
    monkeypatch.setattr(jobs, "gather", _stopped)
    with pytest.raises(SystemExit):
        next(again.run())
    assert jobs.done[-1] == "abort job-1"


def test_trainer_that_did_not_say_why_is_shown_with_the_end_of_its_sites_log() -> None:
    log = "".join(f"line {k}\n" for k in range(100)) + "ModuleNotFoundError: No module named 'nemo'\n"
    exited = TrainerFailure("the trainer process ended with exit code 1", has_traceback=False)
    told = explain("site-1", exited, log)
    assert told.startswith(
        "the trainer of site-1 failed:\nthe trainer process ended with exit code 1\nThe end of the site's log:\nline 61"
    )
    assert told.endswith("\nModuleNotFoundError: No module named 'nemo'")
