"""Reads the journal of a job: from its server while it runs, from its result afterwards."""

from fedsft_assets.federation.protocol.journal import JOURNAL_FILE
from fedsft_assets.federation.protocol.messages import JOURNAL_COMMAND
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.runtimes.flare.results import JobResults
from fedsft_assets.federation.runtimes.flare.session import FlareSession

_ANSWER_SECONDS = 3.0


class JournalReader:
    """Returns each line of a job's journal once."""

    def __init__(self, session: FlareSession, results: JobResults) -> None:
        self._session, self._results = session, results
        self._offsets: dict[str, int] = {}

    def new_lines_of_running(self, job_id: str) -> list[str]:
        """New lines of a running job. Raises RefusedError."""
        lines: list[str] = []
        while text := self._next_text(job_id):
            lines += text.splitlines()
        return lines

    def new_lines_of_ended(self, job_id: str) -> list[str]:
        """The rest of an ended job's journal."""
        result = self._results.folder_of(job_id)
        if result is None:
            return []
        journal = Tail(result / JOURNAL_FILE, self._offsets.get(job_id, 0))
        lines = journal.new_lines()
        self._offsets[job_id] = journal.offset
        return lines

    def all_lines_of_ended(self, job_id: str) -> list[str] | None:
        """The whole journal of an ended job; None if the server has none."""
        result = self._results.folder_of(job_id)
        return Tail(result / JOURNAL_FILE).new_lines() or None if result else None

    def _next_text(self, job_id: str) -> str:
        """The next part of the journal; also empty while the job's server process is starting, ending or busy."""
        request = {"offset": self._offsets.get(job_id, 0)}
        answer = self._session.try_call(
            lambda session: session.do_app_command(job_id, JOURNAL_COMMAND, request), _ANSWER_SECONDS
        )
        if not answer or not answer.get("text"):
            return ""
        self._offsets[job_id] = int(answer["offset"])
        return str(answer["text"])
