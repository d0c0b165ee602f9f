"""What `auto` is at a site: tried once in an execution, with a real tiny model, and kept."""

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fedsft_assets.federation.site.cpu_slots import TURNS, make_turns, turn
from fedsft_assets.federation.site.precision import SitePrecisionError, site_precision
from fedsft_assets.federation.site.state import SiteState
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.devices.interface import MEETING_FILE
from fedsft_assets.model.training.precision_trial import Trial
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.job import Precision, TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.plan import ResolvedTraining, SitePlan
from fedsft_assets_tests.model.slower import slower_in

TOKENS = [Tokens(list(range(length)), prompt=3) for length in range(6, 14)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "tiny.nemo"
    create_base_model(PRESETS["tiny"], path, 7, ["What is the colour of snow?\n\nAnswer: white"])
    return path


@pytest.fixture
def model(base: Path) -> LanguageModel:
    return LanguageModel.load(base)


@pytest.fixture(autouse=True)
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that says it computes in bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


def _plan(base: Path, precision: Precision = "auto", devices: int = 1) -> SitePlan:
    training = PRESETS["tiny"].resolve(TrainingSpec(batch_size=4, devices=devices))
    return SitePlan(
        job="fedavg",
        site="site-1",
        rounds=3,
        local_epochs=1,
        max_local_steps=None,
        max_evaluation_records=None,
        seed=1,
        training=ResolvedTraining(**{**training.model_dump(), "precision": precision}),
        base_model=base,
        training_file=Path("training.jsonl"),
        validation_file=Path("validation.jsonl"),
        digests={},
    )


def _decided(model: LanguageModel, plan: SitePlan, state: Path | None, slow: str) -> Trial:
    with slower_in(model, slow, seconds=0.1):
        return site_precision(model, TOKENS, plan, state, lambda: None)


def test_what_is_faster_is_kept_and_never_decided_anew(model: LanguageModel, base: Path, tmp_path: Path) -> None:
    state, plan = tmp_path / "abc" / "site-1", _plan(base)
    first = _decided(model, plan, state, slow="32")
    assert first.precision == "bf16-mixed"
    assert "times the speed of 32" in first.why
    SiteState(state).clear()  # the last round is done
    again = _decided(model, plan, state, slow="bf16-mixed")
    assert again == ("bf16-mixed", "as chosen at the start of this execution")
    assert _decided(model, plan, tmp_path / "def" / "site-1", slow="bf16-mixed").precision == "32"


def test_what_is_kept_goes_with_the_execution(model: LanguageModel, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "abc" / "site-1"
    _decided(model, _plan(base), folder, slow="bf16-mixed")
    os.utime(folder, times=(0, 0))
    SiteState(tmp_path / "next" / "site-1").clear_others([])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_precision_of_the_plan_holds_and_nothing_is_kept(
    model: LanguageModel, base: Path, tmp_path: Path, precision: Precision
) -> None:
    assert _decided(model, _plan(base, precision), tmp_path / "state", slow=precision) == (precision, "")
    assert list(tmp_path.iterdir()) == []


def test_where_there_is_no_choice_that_is_kept_too(
    model: LanguageModel, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert _decided(model, _plan(base), tmp_path, slow="32").precision == "32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert _decided(model, _plan(base), tmp_path, slow="32").precision == "32"


@pytest.mark.parametrize("said", ['{"precision": "auto"}', '{"precision": "bf16"}', "[]", "", '{"other": "32"}'])
def test_damaged_decision_is_an_error_that_names_the_file(
    model: LanguageModel, base: Path, tmp_path: Path, said: str
) -> None:
    (tmp_path / "precision.json").write_text(said)
    message = r"precision\.json: precision: found .*, expected one of 32, bf16-mixed, 16-mixed; write the one named"
    with pytest.raises(SitePrecisionError, match=message):
        _decided(model, _plan(base), tmp_path, slow="32")


def test_trial_waits_for_its_turn_among_the_trainers_of_a_machine(
    model: LanguageModel, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_turns(tmp_path / "turns", at_once=1)
    monkeypatch.setenv(TURNS, str(tmp_path / "turns"))
    minutes = SimpleNamespace(monotonic=itertools.count(0, 61).__next__, sleep=time.sleep)
    monkeypatch.setattr("fedsft_assets.federation.site.cpu_slots.time", minutes)

    class HeardError(Exception):
        pass

    def heard() -> None:
        raise HeardError

    with turn(lambda: None), pytest.raises(HeardError):
        site_precision(model, TOKENS, _plan(base), None, heard)


def test_devices_that_torchrun_did_not_start_are_an_error(
    model: LanguageModel, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ModelError, match=r"devices: 2, but 1 processes run; start .* torchrun --nproc-per-node 2"):
        site_precision(model, TOKENS, _plan(base, devices=2), None, lambda: None)


_RANK = """
import os
import sys
from pathlib import Path
import torch
from fedsft_assets.federation.site.precision import site_precision
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.devices.choose import devices_for
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets_tests.model.slower import slower_in
folder = Path(sys.argv[1])
torch.cpu.get_capabilities = lambda: {"avx512_bf16": True}
plan = SitePlan.model_validate_json((folder / "plan.json").read_text())
model = LanguageModel.load(plan.base_model)
tokens = [Tokens(list(range(length)), prompt=3) for length in range(6, 14)]
with slower_in(model, "32" if os.environ["RANK"] == "0" else "bf16-mixed", seconds=0.1):
    precision, _ = site_precision(model, tokens, plan, folder / "state", lambda: None)
devices = devices_for(model, plan.training.model_copy(update={"precision": precision}))
(folder / f"{devices.rank}-of-{devices.count}").write_text(precision)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_devices_of_one_site_compute_in_what_rank_0_has_decided(base: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(_plan(base, devices=2).model_dump_json())
    (tmp_path / "rank.py").write_text(_RANK)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(tmp_path / "torchrun")),
        *("--log-dir", str(tmp_path), str(tmp_path / "rank.py"), str(tmp_path)),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        MEETING_FILE: str(tmp_path / "meeting"),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path / f"{rank}-of-2").read_text() for rank in range(2)] == ["bf16-mixed"] * 2
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["precision.json"]
