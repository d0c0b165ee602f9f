"""One attempt to complete an execution of a job, from submission to checkpoint."""

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.costs import costs_of
from fedsft_assets.federation.protocol.events import Event, JobError
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport, global_curve
from fedsft_assets.federation.protocol.journal import EntryError, Missed, Progress, Regroup
from fedsft_assets.federation.protocol.phases import longest_phases, round_to_ms
from fedsft_assets.federation.runtimes.choose import make_runtime
from fedsft_assets.federation.runtimes.interface import (
    JobState,
    RefusedError,
    ResultLostError,
    Runtime,
    UnavailableError,
)
from fedsft_assets.federation.supervisor.charges import PrivacyCharges
from fedsft_assets.federation.supervisor.checkpoint import make_checkpoint
from fedsft_assets.federation.supervisor.failures import failure_of_job
from fedsft_assets.federation.supervisor.history import BrokenChainError, History, rounds_begun
from fedsft_assets.federation.supervisor.privacy import RELEASES_FILE, Releases, ReleasesError
from fedsft_assets.federation.supervisor.submission import Submissions
from fedsft_assets.federation.supervisor.workspace import ExecutionRecord, Workspace
from fedsft_assets.files import file_digest, publish_folder
from fedsft_assets.specs.runtime import RuntimeSettings

_RESTARTS = 2  # of a server that died silently; NVFlare's does if a site is lost mid-transfer
_LONGEST_SILENCE = 900.0  # seconds, or twice site_timeout if that is longer
_SECONDS_TO_BEGIN = 10.0  # normal time to start; after that, say what the job waits for
_SECONDS_TO_END = 30.0  # of a finished job; NVFlare may wait minutes for a site that has left


class OrphanedError(Exception):
    """The parent of this process is gone."""


class Supervision:
    """One attempt to complete an execution.

    It polls the job every `poll_seconds`; if it is killed, at most `save_seconds` of run time are lost.
    """

    def __init__(
        self,
        job: JobFolder,
        workspace: Workspace,
        runtime: RuntimeSettings,
        poll_seconds: float = 0.3,
        save_seconds: float = 5.0,
    ) -> None:
        self.spec = job.spec
        self._job, self._workspace, self._record = job, workspace, ExecutionRecord(workspace)
        self._runtime_name = runtime.name
        self.history = History(workspace.journal, self.spec.rounds, self._record.now.rounds)
        self._charges = PrivacyCharges(Releases(job.home / RELEASES_FILE), self.spec)
        self._runtime: Runtime = make_runtime(runtime, job, workspace.runtime)
        self._submissions = Submissions(
            job, workspace.submitted, self._runtime, runtime.name, self._record, self.history, self._charges
        )
        self._restarts_left = _RESTARTS
        self._poll_seconds, self._save_seconds = poll_seconds, save_seconds

    def run(self) -> Iterator[Event]:
        """Run up to the downloaded result. Raises JobError or OrphanedError."""
        if self._record.now.status:
            yield Progress("already finished; using its stored result")
            return
        try:
            yield from self._run()
        except BrokenChainError as error:
            raise self._start_over(error) from error
        except UnavailableError as error:
            self._settle()
            raise JobError(str(error), retryable=True) from error
        except SystemExit:
            self._submissions.end()
            self._settle()
            raise
        except (JobError, GeneratorExit):
            self._settle()
            raise

    def _end_to_regroup(self, job_id: str, regroup: Regroup, rounds: int) -> Iterator[Event]:
        """End a job to resubmit it with more sites; `rounds` were finished when it started."""
        yield Progress(f"resubmitting FLARE job {job_id} to include {', '.join(regroup.sites)}")
        self._runtime.abort(job_id)
        if self.history.rounds > rounds:  # progress was made: no limit on regrouping
            self._restarts_left = _RESTARTS

    def _run(self) -> Iterator[Event]:
        """Run one FLARE job after another until one has finished and its result is downloaded."""
        while True:
            restarts_left, rounds = self._restarts_left, self.history.rounds
            self._restarts_left -= 1
            submissions = self._record.now.submissions
            job_id = yield from self._submissions.attach_or_submit(self._read)
            reattached = self._record.now.submissions == submissions
            try:
                state = yield from self._follow(job_id)
            except RefusedError:
                raise
            except UnavailableError as error:  # a runtime of our own is restarted
                if not restarts_left:
                    raise
                yield Progress(f"{str(error).splitlines()[0]}; reconnecting to FLARE job {job_id}")
                continue
            stopped = self.history.stopped
            if self._is_done(state):
                try:
                    self._fetch(job_id, state)
                    return
                except ResultLostError as error:
                    self._record.save(stopped=True)  # the next job only has to hand over the result
                    if not restarts_left:
                        raise
                    yield Progress(f"{error}; resubmitting the job to recover the result")
                    continue
            if state.forbidden:
                raise JobError(
                    f"FLARE job {job_id} is not authorized: {state.status}; see local/authorization.json in that"
                    " participant's startup kit"
                )
            if self.history.regroup and restarts_left:
                yield from self._end_to_regroup(job_id, self.history.regroup, rounds)
                continue
            if stopped:
                self._record.save(stopped=True)
            if stopped or not restarts_left:
                failure = failure_of_job(self._runtime, self.history, job_id, state)
                # A reattached job may have been interrupted before this attempt.
                if not (failure.retryable and reattached and restarts_left):
                    raise failure
            why = stopped.reason if stopped else f"its server died ({state.status})"
            yield Progress(f"FLARE job {job_id} failed: {why}; restarting")
            self._runtime.abort(job_id)

    def finished(self, into: Path) -> JobReport | None:
        """The report of an earlier attempt, if its checkpoint is complete; None otherwise."""
        archive = into / MODEL_FILE
        if (
            not self._record.now.checkpoint
            or not archive.is_file()
            or file_digest(archive) != self._record.now.checkpoint
        ):
            return None
        return JobReport.read(into)

    def finish(self, weights: Path, testing_file: Path, into: Path) -> JobReport:
        """Write the checkpoint and its report from these weights. Raises JobError."""
        saving, spec, points = time.monotonic(), self.spec, list(self.history.points.values())
        try:
            curve = global_curve(points, spec)
        except ValueError as error:  # the server reports success, but its journal is incomplete
            raise JobError(f"FLARE job {self._record.now.job_id}: {error}") from error
        epsilon, releases = self._charges.spent()
        costs = costs_of(points, spec.rounds, {(one.site, one.round) for one in self.history.missed})
        with publish_folder(into) as folder:
            made = make_checkpoint(
                *self._runtime.command("fedsft_assets.federation.supervisor.checkpoint"),
                self._job.path,
                weights,
                testing_file,
                folder,
            )
            report = JobReport(
                job=spec.name,
                kind=spec.kind,
                rounds=spec.rounds,
                best_round=curve.best_round,
                tokens=curve.tokens,
                samples=curve.samples,
                val_loss=curve.val_loss,
                test_loss=made.test_loss,
                perplexity=made.perplexity,
                seconds=self._record.seconds,
                phases={**longest_phases(points), "save": round_to_ms(time.monotonic() - saving)},
                checkpoint_digest=made.digest,
                base_model_digest=made.base_model_digest,
                validation_digest=self._job.plans[0].digests["validation_file"],
                runtime=self._runtime_name,
                job_id=self._record.now.job_id or "",
                status=self._record.now.status or "",
                missed=_by_site(self.history.missed),
                epsilon=epsilon,
                history=self._record.now.id,
                releases=releases,
                seed=spec.seed,
                **asdict(costs),
                elapsed=[round_to_ms(self._record.seconds_at(time)) for time in curve.times],
            )
            report.write(folder)
        self._record.save(checkpoint=file_digest(into / MODEL_FILE))
        return report

    def close(self) -> None:
        """Release the runtime."""
        self._runtime.close()

    def _follow(self, job_id: str) -> Generator[Event, None, JobState]:
        """Follow the job; on failure, abort it unless it should survive."""
        try:
            return (yield from self._events_until_end(job_id))
        except (OrphanedError, GeneratorExit, UnavailableError):  # unreachable: cannot be aborted
            if not self._runtime.survives_submitter:
                self._runtime.abort(job_id)
            raise
        except BaseException:
            self._runtime.abort(job_id)
            raise

    def _events_until_end(self, job_id: str) -> Generator[Event, None, JobState]:
        """Yield events of a running job until it has ended and its journal is read completely."""
        parent, begun, reported = os.getppid(), time.monotonic(), ""
        heard = begun
        finished: float | None = None
        while True:
            if os.getppid() != parent:
                raise OrphanedError
            state = self._runtime.poll(job_id)
            try:
                if (yield from self._read(job_id)) or state.waiting or self.history.finished:
                    heard = time.monotonic()
            except RefusedError as error:  # the server is alive, but denies access
                heard = time.monotonic()
                if not reported:
                    reported = f"{error}; no progress is available until the job has ended"
                    yield Progress(reported)
            if state.ended:
                return state
            if state.waiting and state.status != reported and time.monotonic() - begun > _SECONDS_TO_BEGIN:
                reported = state.status
                yield Progress(f"FLARE job {job_id} is waiting: {reported}")
            if self.history.finished:
                finished = time.monotonic() if finished is None else finished
                if time.monotonic() - finished > _SECONDS_TO_END:
                    yield Progress(f"FLARE job {job_id} has finished but does not exit; aborting it")
                    self._runtime.abort(job_id)
            silent = time.monotonic() - heard
            if silent > max(_LONGEST_SILENCE, 2 * self.spec.site_timeout):
                raise JobError(
                    f"FLARE job {job_id}: no message from server or sites for {silent:.0f} s", retryable=True
                )
            time.sleep(self._poll_seconds)

    def _read(self, job_id: str) -> Generator[Event, None, bool]:
        """Yield new events of the job's journal; returns whether there were any. Raises BrokenChainError."""
        lines = self._runtime.new_lines(job_id)
        events = list(self.history.take(lines))
        rounds = self.history.rounds
        if rounds != self._record.now.rounds or self._record.seconds - self._record.now.seconds > self._save_seconds:
            self._record.save(rounds=rounds)
        if lines:
            to_come = 0 if self.history.said_all else self.history.releases_to_come
            self._charges.charge(self._record.now.id, self.history.releases + to_come)
        yield from events  # only after all is on disk: the consumer may stop this process at any event
        return bool(lines)

    def _is_done(self, state: JobState) -> bool:
        """Whether the job completed its work. Its journal decides, not the status that NVFlare reports."""
        return (state.succeeded or self.history.finished) and not self.history.stopped

    def _start_over(self, why: BrokenChainError) -> JobError:
        """End this execution, whose history is broken, and start another one from round zero."""
        journal = self._whole_journal()
        # The other history may have got further than what was read of it.
        begun = why.begun + self.spec.rounds if journal is None else rounds_begun(journal)
        self._charges.charge(self._record.now.id, self.history.releases + begun)
        old = self._record.now.id
        self._record.begin_anew()
        return JobError(
            f"history {old} cannot continue: {why}; the next attempt starts history {self._record.now.id} from"
            " round zero",
            retryable=True,
        )

    def _settle(self) -> None:
        """Refund charges for rounds that can no longer happen, if the job has ended and its journal is complete."""
        if not self.spec.filters.privacy:
            return
        with contextlib.suppress(UnavailableError, BrokenChainError, EntryError, ReleasesError, OSError):
            if journal := self._whole_journal():
                # Read from the file: this attempt may have been interrupted anywhere.
                history = History(self._workspace.journal, self.spec.rounds, self._record.now.rounds)
                deque(history.take(journal), maxlen=0)
                self._charges.charge(self._record.now.id, history.releases)

    def _whole_journal(self) -> list[str] | None:
        """The complete journal of the last submission, or None if it is running or unavailable."""
        job_id = self._record.now.job_id
        try:
            return self._runtime.journal(job_id) if job_id and self._runtime.poll(job_id).ended else None
        except UnavailableError:
            return None

    def _fetch(self, job_id: str, state: JobState) -> None:
        shutil.rmtree(self._workspace.result, ignore_errors=True)
        with publish_folder(self._workspace.result) as folder:
            self._runtime.fetch(job_id, folder)
        self._record.save(status=state.status)


def _by_site(missed: list[Missed]) -> dict[str, list[int]]:
    sites = sorted({one.site for one in missed})
    return {site: sorted({one.round for one in missed if one.site == site}) for site in sites}
