"""An admin's connection to a running NVFlare system, through a startup kit. NVFlare is imported on first use."""

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from fedsft_assets.federation.runtimes.interface import RefusedError, UnavailableError
from fedsft_assets.federation.runtimes.plain_path import plain_path
from fedsft_assets.specs.runtime import Timeouts

_RETRY_SECONDS = 2.0
_HINT = "check that it is running and reachable from this machine"
_T = TypeVar("_T")


def _new_session(startup_kit: Path, username: str, study: str) -> Any:
    from nvflare.fuel.flare_api.flare_api import Session

    return Session(username=username, startup_path=str(startup_kit), study=study)


class FlareSession:
    """Connects on first use and reconnects when the connection is lost. Not thread-safe.

    An open connection keeps the interpreter alive: call `disconnect` when done.
    """

    def __init__(
        self,
        startup_kit: Path,
        folder: Path,
        study: str = "default",
        timeouts: Timeouts | None = None,
        permanent_failure: Callable[[], str] = lambda: "",
        hint: str = _HINT,
        new_session: Callable[[Path, str, str], Any] = _new_session,
    ) -> None:
        """`startup_kit` is the admin's folder with `startup/fed_admin.json`, which is only read.

        `folder` takes downloads and temporary files. `permanent_failure` returns why retrying is useless, or an empty
        string; `hint` is appended to the error about a server that does not answer. `new_session` creates NVFlare's
        session from a startup kit, a user name and a study.
        """
        self.startup_kit, self.folder, self.timeouts = startup_kit, folder, timeouts or Timeouts()
        self._study = study
        self._permanent_failure, self._hint = permanent_failure, hint
        self._new_session = new_session
        self._session: Any = None
        self.server_started = 0.0
        """When the connected server started, in seconds since the epoch."""

    @property
    def address(self) -> str:
        """Host and port of the server in the startup kit. Raises UnavailableError for an invalid kit."""
        admin = self._admin_config()
        return f"{admin.get('host')}:{admin.get('port')}"

    def call(
        self, call: Callable[[Any], _T], patience: float | None = None, command_timeout: float | None = None
    ) -> _T:
        """Return `call(session)` of a connected session, retrying for `patience` seconds while the server is away.

        `command_timeout` limits each single attempt, in seconds; both default to the session's timeouts. Raises
        UnavailableError if the server stays unreachable or refuses, RefusedError for a missing right; errors about a
        job (JobNotFound and the like) are passed on unchanged.
        """
        from nvflare.fuel.flare_api import api_spec

        about_the_job = (
            *(api_spec.JobNotFound, api_spec.JobNotRunning, api_spec.JobNotDone),
            *(api_spec.SubmitTokenConflict, api_spec.SubmitTokenJobDeleted),
        )
        refused = (api_spec.AuthenticationError, api_spec.AuthorizationError, api_spec.InvalidJobDefinition)
        patience = patience or self.timeouts.reconnect
        deadline = time.monotonic() + patience
        while True:
            if reason := self._permanent_failure():
                raise UnavailableError(reason)
            try:
                with _quiet():
                    session = self._connection(max(1.0, deadline - time.monotonic()))
                    with self._command_timeout(session, command_timeout):
                        return call(session)
            except (*about_the_job, UnavailableError):
                raise
            except refused as error:
                # A restarted server no longer knows the session; that is not a refusal of its user.
                if isinstance(error, api_spec.AuthenticationError) and self._session is not None:
                    self.disconnect()
                    continue
                kind = RefusedError if isinstance(error, api_spec.AuthorizationError) else UnavailableError
                raise kind(self._refusal(error)) from error
            except Exception as error:
                self.disconnect()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise UnavailableError(
                        f"the server at {self.address} did not answer for {patience:.0f} s ({_first_line(error)});"
                        f" {self._hint}"
                    ) from error
                time.sleep(min(_RETRY_SECONDS, left))

    def try_call(self, call: Callable[[Any], _T], seconds: float) -> _T | None:
        """Call once, for at most `seconds`; None if there is no answer or no open connection.

        Raises RefusedError: a missing right is an answer.
        """
        from nvflare.fuel.flare_api.api_spec import AuthorizationError

        session = self._session
        if session is None:
            return None
        try:
            with _quiet(), self._command_timeout(session, seconds):
                return call(session)
        except AuthorizationError as error:
            raise RefusedError(self._refusal(error)) from error
        except Exception:
            return None

    def submit_job(self, job_folder: Path, token: str | None = None) -> str:
        """Submit a job and return its FLARE job id; a token that was used before returns the job of that time.

        The server keeps tokens on its disk for each study and user, across its restarts and after their jobs ended or
        were deleted.
        """
        from nvflare.fuel.flare_api.api_spec import SubmitTokenConflict, SubmitTokenJobDeleted

        try:
            # NVFlare puts the folder's path into a command line, and takes the job's name from it.
            with plain_path(job_folder.parent) as parent, _temporary_files_in(self.folder):
                path = str(parent / job_folder.name)
                return str(self.call(lambda session: session.submit_job(path, submit_token=token)))
        except SubmitTokenJobDeleted as error:
            return str(error.job_id)
        except SubmitTokenConflict as error:  # different bytes, e.g. from another version of this package
            return str(error.existing_job_id)

    def disconnect(self) -> None:
        """Close the connection; the next call opens another."""
        session, self._session = self._session, None
        if session is not None:
            _close(session)

    def _refusal(self, error: Exception) -> str:
        identity = f"study {self._study}, startup kit {self.startup_kit}"
        return f"the server at {self.address} refuses ({identity}): {error}"

    def _connection(self, seconds: float) -> Any:
        if self._session is None:
            session = self._new_session(self._private_kit(), self._username(), self._study)
            session.set_timeout(self.timeouts.command)
            session.api.file_download_progress_timeout = self.timeouts.download
            try:
                session.try_connect(min(seconds, self.timeouts.connect))
            except BaseException:
                _close(session)
                raise
            self._session = session
            self.server_started = float(session.get_system_info().server_info.start_time)
        return self._session

    @contextlib.contextmanager
    def _command_timeout(self, session: Any, seconds: float | None) -> Iterator[None]:
        if seconds is None:
            yield
            return
        session.set_timeout(seconds)
        try:
            yield
        finally:
            session.set_timeout(self.timeouts.command)

    def _private_kit(self) -> Path:
        """A private kit that links to the user's: NVFlare downloads into the startup kit that it is given."""
        kit = self.folder / "admin"
        kit.mkdir(parents=True, exist_ok=True)
        for part in ("startup", "local"):
            source = self.startup_kit.resolve() / part
            if source.is_dir() and not (kit / part).is_symlink():
                (kit / part).symlink_to(source)
        return kit

    def _username(self) -> str:
        """The user name in the kit; empty where NVFlare takes it from the certificate."""
        return str(self._admin_config().get("username") or "")

    def _admin_config(self) -> dict[str, Any]:
        path = self.startup_kit / "startup" / "fed_admin.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            admin = content["admin"]
        except FileNotFoundError as error:
            raise UnavailableError(
                f"{path}: no such file; expected an admin's startup kit, the folder that contains startup/"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{path}: not a valid configuration of an admin's startup kit: {error}") from error
        return dict(admin)


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """Redirect temporary files: NVFlare leaves its upload behind if the server rejects it or does not answer."""
    folder.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Drop what NVFlare's client prints on standard output."""
    return contextlib.redirect_stdout(io.StringIO())


def _close(session: Any) -> None:
    """Log out within a second: without a server, that would take as long as any command."""
    session.set_timeout(1.0)
    with contextlib.suppress(Exception), _quiet():
        session.close()
    with contextlib.suppress(Exception):
        session.api.close()
