"""How a trainer's process ends; what it does is in the tests of the site's trainer and of whole jobs."""

import sys
from pathlib import Path

import nvflare.client as flare
import pytest
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.client.cell.attach_session import TrainerSessionError

from fedsft_assets.federation.protocol.messages import FAILURE_KEY
from fedsft_assets.federation.site import process as client
from fedsft_assets.federation.site.failure_log import FAILURE_MARK, first_failure


@pytest.mark.parametrize(
    ("error", "own"), [(ValueError("no such record"), True), (TrainerSessionError("session aborted"), False)]
)
def test_only_a_failure_of_its_own_is_told_as_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    own: bool,
) -> None:
    def fails(_: str) -> None:
        raise error

    plan = tmp_path / "plan.json"
    plan.write_text("{}", encoding="utf-8")
    monkeypatch.setattr(client.SitePlan, "model_validate_json", fails)
    told: list[FLModel] = []
    monkeypatch.setattr(flare, "receive", lambda: None)
    monkeypatch.setattr(flare, "send", told.append)
    monkeypatch.setattr(sys, "argv", ["client", "--plan", str(plan)])
    with pytest.raises(SystemExit) as end:
        client.main()
    assert end.value.code
    assert [str(error) in model.meta[FAILURE_KEY] for model in told] == [True] * own
    printed = capsys.readouterr().out
    assert (FAILURE_MARK in printed) == own
    failure = first_failure(printed)
    assert (failure is not None and failure.has_traceback) == own
