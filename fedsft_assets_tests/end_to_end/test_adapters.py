"""A federated job with `peft:` for real: only adapters travel, and the checkpoint is an archive like any other."""

from pathlib import Path

import pytest
import torch

from fedsft_assets.federation.job_folder import JobFolder, build_job_folder
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.protocol.messages import BEST_MODEL, LAST_MODEL
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store, archive_file, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import TINY
from fedsft_assets_tests.shipped import DATASETS

pytestmark = pytest.mark.slow

JOB = """
description: adapters of two sites
sites:
  site-1: {dataset: alpaca}
  site-2: {dataset: dolly}
rounds: 2
max_local_steps: 8
max_evaluation_records: 40
training:
  learning_rate: 1e-2
  peft: {rank: 4}
"""


def test_adapters_of_two_sites_become_a_checkpoint(store: Store, tmp_path: Path) -> None:
    from peft import PeftModel

    from fedsft_assets.model.language_model import LanguageModel
    from fedsft_assets.model.training.local_training import mean_loss, split_tokens
    from fedsft_assets.model.training.lora import ADAPTER_FOLDER

    (tmp_path / "lora.yaml").write_text(JOB)
    spec = JobSpec.load(tmp_path / "lora.yaml", list(DATASETS))
    build_job_folder(spec, TINY, store)
    said, report = [], None
    for event in run_job(
        job=current(store.job_folder("lora")),
        workspace=store.flare("lora"),
        testing_file=split_file(current(store.combined), "testing"),
        into=store.checkpoint("lora"),
    ):
        if isinstance(event, Progress):
            said.append(event.text)
        if isinstance(event, JobReport):
            report = event
    assert report is not None
    plan = JobFolder.read(current(store.job_folder("lora"))).located_plans[0]
    validation = split_file(current(store.combined), "validation")

    # The adapters of the first round change nothing, so its loss is the base model's; then it falls.
    base = LanguageModel.load(archive_file(current(store.base_model(TINY.name))))
    tokens = split_tokens(base, validation, plan.training.max_length, plan.max_evaluation_records)
    assert report.base_val_loss == pytest.approx(mean_loss(base, tokens, plan.training).loss, abs=1e-4)
    assert report.val_loss == sorted(report.val_loss, reverse=True)
    assert report.last_val_loss < report.base_val_loss - 0.2
    for site in spec.sites:
        assert any(line.startswith(f"{site} · adapters of rank 4 · 24,576 of ") for line in said)

    # What travels: rank * (inputs + outputs) of each of 2 * 4 layers, and nothing of the base model.
    result = Workspace(store.flare("lora")).result
    best = torch.load(result / BEST_MODEL, weights_only=True)
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in best)
    width = 192
    layers = 2 * (width + 3 * width) + 2 * (width + width) + 2 * 2 * (width + 4 * width)
    assert sum(tensor.numel() for tensor in best.values()) == 4 * layers == 24_576
    whole = sum(tensor.numel() * 4 for tensor in base.weights().values())
    assert (result / LAST_MODEL).stat().st_size < whole / 20

    checkpoint = store.checkpoint("lora")
    merged = LanguageModel.load(checkpoint / MODEL_FILE)
    assert {name: tensor.shape for name, tensor in merged.weights().items()} == {
        name: tensor.shape for name, tensor in base.weights().items()
    }
    assert mean_loss(merged, tokens, plan.training).loss == pytest.approx(report.best_val_loss, abs=1e-4)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        with_adapters = PeftModel.from_pretrained(base.lm.eval(), checkpoint / ADAPTER_FOLDER)(input_ids=ids).logits
        assert (with_adapters - merged.lm.eval()(input_ids=ids).logits).abs().max() < 1e-5
