"""One attempt to bring an execution of a job to its end, from its submission to its checkpoint."""

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path

from fedsft_assets.federation.job_folder import JobFolder
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

_POLL_SECONDS = 0.3
_SAVE_SECONDS = 5.0  # so much of the time that an attempt took is forgotten at most when it is killed
_RESTARTS = 2  # of a server that died without a word; NVFlare's does when it loses a site while a result arrives
_LONGEST_SILENCE = 900.0  # seconds; with a long site_timeout, twice that: the server must have spoken by then
_SECONDS_TO_BEGIN = 10.0  # of a job that waits for nothing; of another one it is said what it waits for
_SECONDS_TO_END = 30.0  # of a finished job; NVFlare may wait many minutes for the last word of a site that has left


class OrphanedError(Exception):
    """Whoever started this process is gone."""


class Supervision:
    """One attempt to bring an execution to its end."""

    def __init__(self, job: JobFolder, workspace: Workspace, runtime: RuntimeSettings) -> None:
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

    def run(self) -> Iterator[Event]:
        """Everything up to the fetched result. Raises JobError or OrphanedError."""
        if self._record.now.status:
            yield Progress("already finished; using its stored result")
            return
        try:
            yield from self._run()
        except BrokenChainError as error:
            raise self._begun_anew(error) from error
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
        """End a job that is to be submitted again with more sites; so many rounds were done before it."""
        yield Progress(f"FLARE job {job_id} is submitted again, with {', '.join(regroup.sites)} too")
        self._runtime.abort(job_id)
        if self.history.rounds > rounds:  # it has got on, so this may happen as often as it likes
            self._restarts_left = _RESTARTS

    def _run(self) -> Iterator[Event]:
        """One job after the other, until one has done all and its result is fetched."""
        while True:
            restarts_left, rounds = self._restarts_left, self.history.rounds
            self._restarts_left -= 1
            submissions = self._record.now.submissions
            job_id = yield from self._submissions.attach_or_submit(self._read)
            taken_over = self._record.now.submissions == submissions
            try:
                state = yield from self._followed(job_id)
            except RefusedError:
                raise
            except UnavailableError as error:  # what is ours to start is started again
                if not restarts_left:
                    raise
                yield Progress(f"{str(error).splitlines()[0]}; FLARE job {job_id} is looked for again")
                continue
            stopped = self.history.stopped
            if self._is_done(state):
                try:
                    self._fetch(job_id, state)
                    return
                except ResultLostError as error:
                    self._record.save(stopped=True)  # the next job has nothing left to do but to hand it over
                    if not restarts_left:
                        raise
                    yield Progress(f"{error}; the job is submitted once more to hand it over")
                    continue
            if state.forbidden:
                raise JobError(
                    f"FLARE job {job_id} may not run: {state.status}; see local/authorization.json in the startup kit"
                    " of whoever says so"
                )
            if self.history.regroup and restarts_left:
                yield from self._end_to_regroup(job_id, self.history.regroup, rounds)
                continue
            if stopped:
                self._record.save(stopped=True)
            if stopped or not restarts_left:
                failure = failure_of_job(self._runtime, self.history, job_id, state)
                # What was cut off in a job that was taken over may have been so before.
                if not (failure.retryable and taken_over and restarts_left):
                    raise failure
            why = stopped.reason if stopped else f"its server died ({state.status})"
            yield Progress(f"FLARE job {job_id} failed: {why}; restarting")
            self._runtime.abort(job_id)

    def finished(self, into: Path) -> JobReport | None:
        """What an earlier attempt told, or was about to, if its checkpoint is there: told again, it is the same."""
        archive = into / MODEL_FILE
        if (
            not self._record.now.checkpoint
            or not archive.is_file()
            or file_digest(archive) != self._record.now.checkpoint
        ):
            return None
        return JobReport.read(into)

    def finish(self, weights: Path, testing_file: Path, into: Path) -> JobReport:
        """Write the checkpoint of these weights and its report. Raises JobError."""
        saving, spec, points = time.monotonic(), self.spec, list(self.history.points.values())
        try:
            curve = global_curve(points, spec)
        except ValueError as error:  # the server says that it has finished, and its journal does not
            raise JobError(f"FLARE job {self._record.now.job_id}: {error}") from error
        epsilon, releases = self._charges.spent()
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
            )
            report.write(folder)
        self._record.save(checkpoint=file_digest(into / MODEL_FILE))
        return report

    def close(self) -> None:
        """Let go of the runtime."""
        self._runtime.close()

    def _followed(self, job_id: str) -> Generator[Event, None, JobState]:
        """Follow the job, and leave nothing behind that should not live on."""
        try:
            return (yield from self._follow(job_id))
        except (OrphanedError, GeneratorExit, UnavailableError):  # who cannot be reached cannot be told to end it
            if not self._runtime.survives_submitter:
                self._runtime.abort(job_id)
            raise
        except BaseException:
            self._runtime.abort(job_id)
            raise

    def _follow(self, job_id: str) -> Generator[Event, None, JobState]:
        """Events of a running job until it has ended and all is read."""
        parent, begun, told = os.getppid(), time.monotonic(), ""
        heard = begun
        finished: float | None = None
        while True:
            if os.getppid() != parent:
                raise OrphanedError
            state = self._runtime.poll(job_id)
            try:
                if (yield from self._read(job_id)) or state.waiting or self.history.finished:
                    heard = time.monotonic()
            except RefusedError as error:  # an answer, if not the one that was hoped for
                heard = time.monotonic()
                if not told:
                    told = f"{error}; what the job does is known only when it has ended"
                    yield Progress(told)
            if state.ended:
                return state
            if state.waiting and state.status != told and time.monotonic() - begun > _SECONDS_TO_BEGIN:
                told = state.status
                yield Progress(f"FLARE job {job_id} waits: {told}")
            if self.history.finished:
                finished = time.monotonic() if finished is None else finished
                if time.monotonic() - finished > _SECONDS_TO_END:
                    yield Progress(f"FLARE job {job_id} has finished, but does not end by itself; it is ended")
                    self._runtime.abort(job_id)
            silent = time.monotonic() - heard
            if silent > max(_LONGEST_SILENCE, 2 * self.spec.site_timeout):
                raise JobError(
                    f"FLARE job {job_id}: neither server nor sites said anything for {silent:.0f} s", retryable=True
                )
            time.sleep(_POLL_SECONDS)

    def _read(self, job_id: str) -> Generator[Event, None, bool]:
        """Events of what the job's journal has more; whether it has any. Raises BrokenChainError."""
        lines = self._runtime.new_lines(job_id)
        events = list(self.history.take(lines))
        rounds = self.history.rounds
        if rounds != self._record.now.rounds or self._record.seconds - self._record.now.seconds > _SAVE_SECONDS:
            self._record.save(rounds=rounds)
        if lines:
            to_come = 0 if self.history.said_all else self.history.releases_to_come
            self._charges.charge(self._record.now.id, self.history.releases + to_come)
        yield from events  # all is on the disk: whoever hears of something may stop this process at once
        return bool(lines)

    def _is_done(self, state: JobState) -> bool:
        """Whether the job did all that it was for. Its own word counts, however NVFlare says that it ended."""
        return (state.succeeded or self.history.finished) and not self.history.stopped

    def _begun_anew(self, why: BrokenChainError) -> JobError:
        """The end of this execution: its points, its MLflow runs and its rounds are of a history that cannot go on."""
        journal = self._whole_journal()
        # What was read of the other history may be less than it came to before it was ended.
        begun = why.begun + self.spec.rounds if journal is None else rounds_begun(journal)
        self._charges.charge(self._record.now.id, self.history.releases + begun)
        old = self._record.now.id
        self._record.begin_anew()
        return JobError(
            f"history {old} cannot go on: {why}; another attempt begins history {self._record.now.id} from zero",
            retryable=True,
        )

    def _settle(self) -> None:
        """Take back what was charged for rounds that cannot come any more, if the job has ended and told all."""
        if not self.spec.filters.privacy:
            return
        with contextlib.suppress(UnavailableError, BrokenChainError, EntryError, ReleasesError, OSError):
            if journal := self._whole_journal():
                # Read anew: this may be the end of an attempt that was stopped in the middle of anything.
                history = History(self._workspace.journal, self.spec.rounds, self._record.now.rounds)
                deque(history.take(journal), maxlen=0)
                self._charges.charge(self._record.now.id, history.releases)

    def _whole_journal(self) -> list[str] | None:
        """The journal of the last submission, if that has ended and all of it can be had."""
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
