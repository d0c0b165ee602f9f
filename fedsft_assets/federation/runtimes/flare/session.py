"""An admin's connection to a running NVFlare system, through a startup kit. NVFlare is imported on first use."""

import contextlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fedsft_assets.federation.runtimes.interface import RefusedError, UnavailableError
from fedsft_assets.specs.runtime import Timeouts

_RETRY_SECONDS = 2.0
_T = TypeVar("_T")


class FlareSession:
    """Opened on first use, and again when it was lost.

    `startup_kit` is the admin's folder with `startup/fed_admin.json`, which is only read; what is downloaded comes
    into `folder`. `permanent_failure` says why there is no use in calling the server, if there is none; `hint` is what
    to do about a server that does not answer. Without `disconnect`, the connection keeps the interpreter from ending.
    Not for several threads at once.
    """

    def __init__(
        self,
        startup_kit: Path,
        folder: Path,
        study: str,
        timeouts: Timeouts,
        permanent_failure: Callable[[], str],
        hint: str,
    ) -> None:
        self.startup_kit, self._study, self._timeouts = startup_kit, study, timeouts
        self._folder = folder
        self._permanent_failure, self._hint = permanent_failure, hint
        self._session: Any = None
        self.server_began = 0.0
        """In seconds since the epoch, of the server that it is connected to."""

    @property
    def address(self) -> str:
        """Host and port of the server, as the startup kit has them. Raises UnavailableError for a kit without."""
        admin = self._admin_config()
        return f"{admin.get('host')}:{admin.get('port')}"

    def call(self, call: Callable[[Any], _T], seconds: float | None = None) -> _T:
        """The answer to `call` of a connected session, trying anew for so long while the server is away.

        Raises UnavailableError when that takes too long or the server refuses, RefusedError for a missing right; what
        the server says about a job (JobNotFound and the like) is raised as it is.
        """
        from nvflare.fuel.flare_api import api_spec

        about_the_job = (
            *(api_spec.JobNotFound, api_spec.JobNotRunning, api_spec.JobNotDone),
            *(api_spec.SubmitTokenConflict, api_spec.SubmitTokenJobDeleted),
        )
        refused = (api_spec.AuthenticationError, api_spec.AuthorizationError, api_spec.InvalidJobDefinition)
        patience = seconds or self._timeouts.reconnect
        waited_until = time.monotonic() + patience
        while True:
            if why := self._permanent_failure():
                raise UnavailableError(why)
            try:
                with _quiet():
                    return call(self._connection(max(1.0, waited_until - time.monotonic())))
            except (*about_the_job, UnavailableError):
                raise
            except refused as error:
                # A server that was restarted does not know the session, which is no refusal of its user.
                if isinstance(error, api_spec.AuthenticationError) and self._session is not None:
                    self.disconnect()
                    continue
                kind = RefusedError if isinstance(error, api_spec.AuthorizationError) else UnavailableError
                raise kind(self._refusal(error)) from error
            except Exception as error:
                self.disconnect()
                left = waited_until - time.monotonic()
                if left <= 0:
                    raise UnavailableError(
                        f"the server at {self.address} did not answer for {patience:.0f} s ({_said(error)});"
                        f" {self._hint}"
                    ) from error
                time.sleep(min(_RETRY_SECONDS, left))

    def try_call(self, call: Callable[[Any], _T], seconds: float) -> _T | None:
        """The answer of the server within so many seconds; None if there is none, or no open connection.

        Raises RefusedError: a missing right is an answer.
        """
        from nvflare.fuel.flare_api.api_spec import AuthorizationError

        session = self._session
        if session is None:
            return None
        session.set_timeout(seconds)
        try:
            with _quiet():
                return call(session)
        except AuthorizationError as error:
            raise RefusedError(self._refusal(error)) from error
        except Exception:
            return None
        finally:
            session.set_timeout(self._timeouts.command)

    def disconnect(self) -> None:
        """Let go of the connection; the next question opens another."""
        session, self._session = self._session, None
        if session is not None:
            _close(session)

    def _refusal(self, error: Exception) -> str:
        asked = f"study {self._study}, startup kit {self.startup_kit}"
        return f"the server at {self.address} refuses ({asked}): {error}"

    def _connection(self, seconds: float) -> Any:
        if self._session is None:
            from nvflare.fuel.flare_api.flare_api import Session

            kit = self._private_kit()
            session = Session(username=self._user(), startup_path=str(kit), study=self._study)
            session.set_timeout(self._timeouts.command)
            session.api.file_download_progress_timeout = self._timeouts.download
            try:
                session.try_connect(min(seconds, self._timeouts.connect))
            except BaseException:
                _close(session)
                raise
            self._session = session
            self.server_began = float(session.get_system_info().server_info.start_time)
        return self._session

    def _private_kit(self) -> Path:
        """NVFlare downloads into the startup kit; this one is ours and has the user's inside, which stays as it is."""
        kit = self._folder / "admin"
        kit.mkdir(parents=True, exist_ok=True)
        for part in ("startup", "local"):
            source = self.startup_kit.resolve() / part
            if source.is_dir() and not (kit / part).is_symlink():
                (kit / part).symlink_to(source)
        return kit

    def _user(self) -> str:
        """The user's name in the kit; empty where NVFlare takes it from the certificate."""
        return str(self._admin_config().get("username") or "")

    def _admin_config(self) -> dict[str, Any]:
        path = self.startup_kit / "startup" / "fed_admin.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            admin = content["admin"]
        except FileNotFoundError as error:
            raise UnavailableError(
                f"{path}: no such file; expected the startup kit of an admin, the folder that has startup/ in it"
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UnavailableError(f"{path}: not the configuration of an admin's startup kit: {error}") from error
        return dict(admin)


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """NVFlare's client prints what it does; nobody here asked for it."""
    return contextlib.redirect_stdout(io.StringIO())


def _close(session: Any) -> None:
    """Without a server, saying goodbye takes as long as any command; a connection that is lost needs none."""
    session.set_timeout(1.0)
    with contextlib.suppress(Exception), _quiet():
        session.close()
    with contextlib.suppress(Exception):
        session.api.close()
