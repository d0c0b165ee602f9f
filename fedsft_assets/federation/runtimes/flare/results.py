"""Results of ended jobs, downloaded from the server."""

from pathlib import Path

from fedsft_assets.federation.runtimes.flare.session import FlareSession


class JobResults:
    """Each result is downloaded once, into the session's folder."""

    def __init__(self, session: FlareSession) -> None:
        self._session = session

    def folder_of(self, job_id: str) -> Path | None:
        """The folder with the files of the job's server part; None if the server has none.

        A server has the result of a job whatever its outcome, unless the job was cut off by the end of the server.
        """
        from nvflare.fuel.flare_api.api_spec import JobNotDone, JobNotFound

        result = self._session.folder / "results" / job_id
        if not result.is_dir():
            try:
                location = self._session.call(lambda session: session.download_job_result(job_id))
            except (JobNotFound, JobNotDone):
                return None
            if not location or not Path(location).is_dir():
                return None
            result.parent.mkdir(parents=True, exist_ok=True)
            Path(location).rename(result)
        workspace = result / "workspace"
        return workspace if workspace.is_dir() else None
