"""Two processes on the CPU, started by torchrun, against one: the same losses and the same weights."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.devices.choose import devices_for
from fedsft_assets.model.training.devices.interface import MEETING_FILE
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets_tests.model import one_round
from fedsft_assets_tests.model.weights import assert_same_weights

TOLERANCE = 1e-5

# 18 records: the last batch of 4 has two, that of 5 has three, shared as two and one.
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"strategy": "ddp"},
    "ddp, micro-batches of one record": {"strategy": "ddp", "batch_size": 5, "micro_batch_size": 1},
    "ddp, one process idle": {"strategy": "ddp", "batch_size": 1, "max_local_steps": 3},
    "ddp, padded": {"strategy": "ddp", "batch_size": 5, "padded": True},
    "ddp, two rounds, moments kept": {"strategy": "ddp", "rounds": 2, "optimizer_state": "keep"},
    "ddp, all tokens learned, checkpointing": {
        **{"strategy": "ddp", "answer_only_loss": False, "activation_checkpointing": True, "micro_batch_tokens": 60},
    },
    "fsdp": {"strategy": "fsdp"},
    "fsdp, micro-batches of one record": {"strategy": "fsdp", "batch_size": 5, "micro_batch_size": 1},
    "fsdp, one process idle": {"strategy": "fsdp", "batch_size": 1, "max_local_steps": 3},
    "fsdp, two rounds, moments kept": {"strategy": "fsdp", "rounds": 2, "optimizer_state": "keep"},
    "fsdp, checkpointing, hard clipping": {
        **{"strategy": "fsdp", "activation_checkpointing": True, "gradient_clip": 0.05, "micro_batch_tokens": 60},
    },
    "ddp, adapters": {"strategy": "ddp", "peft": {"rank": 4}},
    "fsdp, adapters": {"strategy": "fsdp", "peft": {"rank": 4}},
    "ddp, bf16": {"strategy": "ddp", "precision": "bf16-mixed", "max_local_steps": 3},
    "fsdp, bf16": {"strategy": "fsdp", "precision": "bf16-mixed", "max_local_steps": 3},
    "ddp, fp16": {"strategy": "ddp", "precision": "16-mixed", "local_epochs": 2},
    "fsdp, fp16": {"strategy": "fsdp", "precision": "16-mixed", "local_epochs": 2},
}


@dataclass(frozen=True)
class Results:
    """By case, what one process gives, and what two give."""

    one: dict[str, dict[str, Any]]
    two: dict[str, dict[str, Any]]


def loopback_environment(meeting_file: Path) -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        MEETING_FILE: str(meeting_file),
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


def _plan(make_plan: Callable[..., SitePlan], case: dict[str, Any], devices: int) -> SitePlan:
    given = {key: value for key, value in case.items() if key != "padded"}
    return make_plan(**{"rounds": 1, "precision": "32", "learning_rate": 5e-4, **given, "devices": devices})


@pytest.fixture(scope="module")
def results(
    make_plan: Callable[..., SitePlan],
    records: list[dict[str, str]],
    base: tuple[Path, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Results:
    """All cases, under one torchrun: to start it takes longer than to train."""
    from fedsft_assets.model.training.batches import tokenize

    folder = tmp_path_factory.mktemp("two_processes")
    model = LanguageModel.load(base[0])
    tokens = tokenize(records, model.tokenizer, model.max_length)
    cases = [
        {
            "plan": _plan(make_plan, case, devices=2).model_dump_json(),
            "tokens": [(one.ids, one.prompt) for one in tokens],
            "padded": case.get("padded", False),
        }
        for case in CASES.values()
    ]
    torch.save(cases, folder / "cases.pt")
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"),
        *("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", str(folder / "torchrun")),
        *("--log-dir", str(folder), "-m", one_round.__name__, str(folder)),
    ]
    done = subprocess.run(
        command, env=loopback_environment(folder / "meeting"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    two = {name: torch.load(folder / f"{number}.pt", weights_only=True) for number, name in enumerate(CASES)}
    one = {
        name: one_round.train(_plan(make_plan, case, devices=1), tokens, case.get("padded", False))
        for name, case in CASES.items()
    }
    return Results(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("16")])
def test_two_processes_give_what_one_gives(results: Results, case: str) -> None:
    one, two = results.one[case], results.two[case]
    assert two["losses"] == pytest.approx(one["losses"], abs=TOLERANCE)
    assert two["validation"] == pytest.approx(one["validation"], abs=TOLERANCE)
    assert_same_weights(two["weights"], one["weights"], atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ddp, bf16", "fsdp, bf16"])
def test_two_processes_in_bf16_give_what_one_gives_but_for_rounding(results: Results, case: str) -> None:
    one, two = results.one[case], results.two[case]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-3)
    assert two["validation"] == pytest.approx(one["validation"], rel=1e-3)
    assert {tensor.dtype for tensor in two["weights"].values()} == {torch.float32}


@pytest.mark.slow
def test_processes_agree_on_the_steps_that_fp16_skips(results: Results) -> None:
    # Not against one process: it scales its loss half as much, so that other steps overflow.
    copies, shares = results.two["ddp, fp16"], results.two["fsdp, fp16"]
    assert shares["losses"] == pytest.approx(copies["losses"], rel=1e-3)
    assert shares["validation"] == pytest.approx(copies["validation"], rel=1e-3)


@pytest.mark.slow
def test_every_case_trains(results: Results) -> None:
    for case, result in results.two.items():
        assert result["validation"][-1] < result["validation"][0], case


def test_devices_that_torchrun_did_not_start_are_an_error(
    model: LanguageModel, make_plan: Callable[..., SitePlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ModelError, match=r"devices: 2, but 1 processes run; start .* torchrun --nproc-per-node 2"):
        devices_for(model, make_plan(devices=2).training)
