"""Which FLARE job an execution is: one that runs already, or another submission of its job folder."""

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
    """The submissions of one execution, each on the record before it is handed in."""

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
        """`folder` is for the job folder as it is submitted."""
        self._job, self._folder = job, folder
        self._runtime, self._runtime_name = runtime, runtime_name
        self._record, self._history, self._charges = record, history, charges

    def attach_or_submit(self, read: Callable[[str], Generator[Event, None, bool]]) -> Generator[Event, None, str]:
        """Find the job of the last submission, or submit another; returns its id. `read` takes in a job's journal."""
        spec = self._job.spec
        for told in self._runtime.gather(list(spec.sites), spec.min_sites or len(spec.sites)):
            yield Progress(told)
        yield from self._end_superseded()
        if self._record.now.submissions and self._runtime.survives_submitter:
            job_id = self._record.now.job_id or self._submit()  # an earlier attempt was killed before it knew the id
            state = self._runtime.poll(job_id)
            if state.ended and not state.succeeded and not self._record.now.stopped:
                yield from read(job_id)  # its own last word counts, whatever became of it then
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
        yield Progress(f"FLARE job {job_id} in the {self._runtime_name}")
        return job_id

    def end(self) -> None:
        """Abort what was handed in by now, also if the stop came before its id did, or before it was taken over."""
        if self._record.now.submissions and self._runtime.survives_submitter:
            self._runtime.abort(self._record.now.job_id or self._submit())

    def _end_superseded(self) -> Iterator[Event]:
        """Sites are for this execution."""
        for job_id in self._record.now.superseded:
            if self._runtime.survives_submitter and not self._runtime.poll(job_id).ended:
                yield Progress(f"ends FLARE job {job_id}, which is of another execution")
                self._runtime.abort(job_id)
        if self._record.now.superseded:
            self._record.save(superseded=[])

    def _submit(self) -> str:
        """Hand in the last submission, for the first time or once more."""
        job_id = self._runtime.submit(self._submission(), self._record.now.token)
        self._history.begin_job()
        self._record.save(job_id=job_id)
        return job_id

    def _submission(self) -> Path:
        """The job folder, with the execution that it is for in its meta.json."""
        folder = self._folder / self._job.spec.name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._job.path, folder)
        meta_file = folder / "meta.json"
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        meta_file.write_text(json.dumps({**meta, EXECUTION_KEY: self._record.now.id}, indent=2), encoding="utf-8")
        return folder
