"""Connects an execution to a FLARE job: reattaches to a submitted job or submits its job folder again."""

import json
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.events import Event
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.protocol.messages import EXECUTION_KEY
from fedsft_assets.federation.runtimes.interface import Runtime
from fedsft_assets.federation.supervisor.charges import PrivacyCharges
from fedsft_assets.federation.supervisor.history import History
from fedsft_assets.federation.supervisor.workspace import ExecutionRecord


class Submissions:
    """The submissions of one execution, each recorded before it is submitted."""

    def __init__(
        self,
        job: JobFolder,
        folder: Path,
        runtime: Runtime,
        runtime_name: str,
        record: ExecutionRecord,
        history: History,
        charges: PrivacyCharges,
    ) -> None:
        """`folder` is where the copy of the job folder to be submitted is written."""
        self._job, self._folder = job, folder
        self._runtime, self._runtime_name = runtime, runtime_name
        self._record, self._history, self._charges = record, history, charges

    def attach_or_submit(self, read: Callable[[str], Generator[Event, None, bool]]) -> Generator[Event, None, str]:
        """Reattach to the last submitted job, or submit again; returns the job id. `read` reads a job's journal."""
        spec = self._job.spec
        for message in self._runtime.gather(list(spec.sites), spec.min_sites or len(spec.sites)):
            yield Progress(message)
        yield from self._end_superseded()
        if self._record.now.submissions and self._runtime.survives_submitter:
            job_id = self._record.now.job_id or self._submit()  # None if an earlier attempt was killed early
            state = self._runtime.poll(job_id)
            if state.ended and not state.succeeded and not self._record.now.stopped:
                yield from read(job_id)  # its final journal entry decides, not NVFlare's status
            if not self._record.now.stopped and (not state.ended or state.succeeded or self._history.said_all):
                yield Progress(f"reattaching to FLARE job {job_id}")
                return job_id
            self._runtime.abort(job_id)
        if self._record.now.rounds:
            yield Progress(f"resuming after round {self._record.now.rounds} of {spec.rounds}")
        self._record.save(submissions=self._record.now.submissions + 1, job_id=None, stopped=False)
        releases = self._history.releases + self._history.releases_to_come
        self._charges.charge(self._record.now.id, releases, settled=False)
        job_id = self._submit()
        yield Progress(f"submitted FLARE job {job_id} ({self._runtime_name})")
        return job_id

    def end(self) -> None:
        """Abort the submitted job, even if its id is not recorded yet or nothing has reattached to it."""
        if self._record.now.submissions and self._runtime.survives_submitter:
            self._runtime.abort(self._record.now.job_id or self._submit())

    def _end_superseded(self) -> Iterator[Event]:
        """End FLARE jobs of other executions: sites run one job at a time."""
        for job_id in self._record.now.superseded:
            if self._runtime.survives_submitter and not self._runtime.poll(job_id).ended:
                yield Progress(f"ending FLARE job {job_id} of another execution")
                self._runtime.abort(job_id)
        if self._record.now.superseded:
            self._record.save(superseded=[])

    def _submit(self) -> str:
        """Submit the last recorded submission, for the first time or again (idempotent)."""
        job_id = self._runtime.submit(self._submission(), self._record.now.token)
        self._history.begin_job()
        self._record.save(job_id=job_id)
        return job_id

    def _submission(self) -> Path:
        """Copy the job folder, adding the execution id to its meta.json."""
        folder = self._folder / self._job.spec.name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._job.path, folder)
        meta_file = folder / "meta.json"
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        meta_file.write_text(json.dumps({**meta, EXECUTION_KEY: self._record.now.id}, indent=2), encoding="utf-8")
        return folder
