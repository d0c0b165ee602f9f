"""An admin's session: what a server's answers become, and the rights that it grants."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.fuel.flare_api.api_spec import AuthorizationError, InternalError, JobNotDone, JobNotRunning, NoConnection

from fedsft_assets.federation.runtimes.flare.rights import JOB_RIGHTS, require_rights
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import RefusedError
from fedsft_assets.federation.runtimes.plain_path import is_plain
from fedsft_assets.federation.runtimes.production import Production
from fedsft_assets.specs.runtime import ProductionSettings
from fedsft_assets_tests.watched import open_to_others


class Api:
    """NVFlare's session with a server whose policy lacks some rights."""

    def __init__(self, lacking: set[str] | None = None) -> None:
        self.lacking, self.called = lacking or set(), list[str]()

    api = SimpleNamespace()

    def set_timeout(self, seconds: float) -> None:
        pass

    def try_connect(self, seconds: float) -> None:
        pass

    def get_system_info(self) -> SimpleNamespace:
        return SimpleNamespace(server_info=SimpleNamespace(start_time=1.0))

    def _do(self, right: str, name: str, otherwise: Exception | None = None) -> str:
        self.called.append(name)
        if right in self.lacking:
            raise AuthorizationError(f"user not authorized for the action '{name}'")
        if otherwise:
            raise otherwise
        return "job-1"

    def submit_job(self, folder: str, submit_token: str | None) -> str:
        assert submit_token is None
        assert is_plain(Path(folder))
        assert json.loads((Path(folder) / "meta.json").read_text())["mandatory_clients"] == ["fedsft-no-such-site"]
        return self._do("submit_job", "submit_job")

    def get_job_meta(self, _job_id: str) -> str:
        return self._do("view", "get_job_meta")

    def do_app_command(self, _job_id: str, _topic: str, _data: object) -> str:
        return self._do("app_command", "app_command", JobNotRunning())

    def get_job_logs(self, _job_id: str, target: str) -> str:
        return self._do("get_job_log", f"get_job_log {target}", InternalError())

    def download_job_result(self, _job_id: str) -> str:
        return self._do("download_job", "download_job", JobNotDone())

    def abort_job(self, _job_id: str) -> str:
        return self._do("manage_job", "abort_job")

    def delete_job(self, _job_id: str) -> str:
        return self._do("manage_job", "delete_job")


def _session(tmp_path: Path, api: Any) -> FlareSession:
    kit = tmp_path / "kit"
    (kit / "startup").mkdir(parents=True)
    (kit / "startup" / "fed_admin.json").write_text(json.dumps({"admin": {"host": "center", "port": 8102}}))
    return FlareSession(kit, tmp_path / "its own", new_session=lambda *_: api)


def test_missing_right_is_an_answer(tmp_path: Path) -> None:
    session = _session(tmp_path, Api({"app_command"}))
    refusal = (
        r"the server at center:8102 refuses \(study default, startup kit .*\): user not authorized .* 'app_command'"
    )
    with pytest.raises(RefusedError, match=refusal):
        session.call(lambda api: api.do_app_command("job-1", "journal", {}))
    with pytest.raises(RefusedError, match=refusal):
        session.try_call(lambda api: api.do_app_command("job-1", "journal", {}), 1.0)


@pytest.mark.parametrize("error", [JobNotRunning(), NoConnection(), InternalError()])
def test_call_that_is_tried_once_has_no_answer_where_the_server_has_none(tmp_path: Path, error: Exception) -> None:
    def fail(_api: Any) -> str:
        raise error

    session = _session(tmp_path, Api())
    assert session.try_call(lambda _: "answer", 1.0) is None  # not connected yet
    session.call(lambda api: api.get_system_info())
    assert session.try_call(lambda _: "answer", 1.0) == "answer"
    assert session.try_call(fail, 1.0) is None


def test_every_right_that_is_missing_is_named_with_what_it_is_for(tmp_path: Path) -> None:
    api = Api({"app_command", "manage_job"})
    with pytest.raises(RefusedError) as refused:
        require_rights(_session(tmp_path, api))
    assert str(refused.value) == (
        f"the server at center:8102 does not grant the user of {tmp_path / 'kit'} all the rights that a job needs;"
        " missing: app_command (to read the journal of a running job), manage_job (to abort a job); add them to the"
        " permissions in the server's local/authorization.json, as in docs/production.md, and restart the server"
    )


@pytest.mark.parametrize("right", ["submit_job", *JOB_RIGHTS])
def test_every_right_is_required(tmp_path: Path, right: str) -> None:
    with pytest.raises(RefusedError, match=f"missing: {right} "):
        require_rights(_session(tmp_path, Api({right})))


def test_probe_job_is_aborted_and_deleted_where_all_rights_are_granted(tmp_path: Path) -> None:
    api = Api()
    require_rights(_session(tmp_path, api))
    assert api.called[0] == "submit_job"
    assert api.called[-2:] == ["abort_job", "delete_job"]


def test_startup_kit_that_others_may_read_is_closed_before_it_is_used_and_its_user_is_told(tmp_path: Path) -> None:
    kit = tmp_path / "kit"
    (kit / "startup").mkdir(parents=True)
    for name in ("fed_admin.json", "client.key"):
        (kit / "startup" / name).write_text("{}")
        (kit / "startup" / name).chmod(0o644)
    for folder in (kit, kit / "startup"):
        folder.chmod(0o755)
    runtime = Production(ProductionSettings(startup_kit=kit), tmp_path / "own")
    assert next(runtime.gather(["site-1"], 1)) == (
        f"{kit}: this startup kit was open to other accounts of this computer; access removed. Anyone who has read"
        " client.key can impersonate it: have it provisioned again"
    )
    assert open_to_others(kit) == []
