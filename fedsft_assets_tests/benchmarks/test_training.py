import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.data import BenchmarkError
from benchmarks.training.__main__ import require_equal_losses
from benchmarks.training.data import TrainingInput
from benchmarks.training.flops import Shape, step_operations
from benchmarks.training.parts import PARTS
from benchmarks.training.watch import Trained
from fedsft_assets.settings import PROJECT

_LAYERS, _WIDTH, _VOCABULARY = 2, 32, 97
_TRAINED = Trained(
    tokens_per_second=100.0,
    peak_mb=500.0,
    start_cpu_seconds=5.0,
    first_loss=7.0,
    losses=[7.0, 6.5, 0.4],
    tokens=[8, 9, 10],
    seconds=0.2,
)


def test_operations_are_those_that_torch_counts_apart_from_masked_pairs():
    config = GPT2Config(
        n_layer=_LAYERS, n_embd=_WIDTH, n_head=4, n_positions=64, vocab_size=_VOCABULARY, attn_implementation="eager"
    )
    model, records, length = GPT2LMHeadModel(config), 3, 20
    ids = torch.randint(0, _VOCABULARY, (records, length))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # The eager attention multiplies all pairs, also those that the causal mask takes away again.
    masked = 3 * 4 * _WIDTH * _LAYERS * records * (length * length - length * (length + 1) // 2)
    counted = step_operations(Shape(_LAYERS, _WIDTH, _VOCABULARY), [length] * records, records * length)
    assert counter.get_total_flops() == counted + masked


def test_only_answers_need_the_output_projection():
    shape = Shape(_LAYERS, _WIDTH, _VOCABULARY)
    fewer, more = (step_operations(shape, [10, 20], answers) for answers in (5, 15))
    assert more - fewer == 10 * 3 * 2 * _WIDTH * _VOCABULARY


def test_rows_have_labels_at_answers_only():
    given = TrainingInput(Path(), PARTS["tiny"], ids=[[5, 6, 7], [8, 9]], prompts=[2, 1], batches=[[1], [0]])
    assert given.rows(given.order) == [
        {"input_ids": [8, 9], "labels": [-100, 9]},
        {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]},
    ]


def test_losses_that_differ_by_rounding_are_equal():
    near = replace(_TRAINED, first_loss=7.005, losses=[7.005, 6.497, 0.4009])
    require_equal_losses(PARTS["tiny"], {"plain": [_TRAINED], "ours": [near]})


@pytest.mark.parametrize("loss", [0.4011, 0.3989, math.nan])
def test_unequal_losses_of_the_same_batches_name_contender_and_step(loss):
    other = replace(_TRAINED, losses=[7.0, 6.5, loss])
    with pytest.raises(BenchmarkError, match=r"tiny: ours has loss .* at step 3, plain has 0\.4"):
        require_equal_losses(PARTS["tiny"], {"plain": [_TRAINED, _TRAINED], "ours": [_TRAINED, other]})


def test_contenders_of_another_order_must_agree_on_the_first_batch_only():
    other = replace(_TRAINED, losses=[1.0, 2.0, 3.0])
    require_equal_losses(PARTS["tiny"], {"plain": [_TRAINED], "trl-packing": [other]})
    with pytest.raises(BenchmarkError, match=r"trl-packing has loss 7\.008000 at the first batch"):
        require_equal_losses(PARTS["tiny"], {"plain": [_TRAINED], "trl-packing": [replace(other, first_loss=7.008)]})


def test_a_contender_that_stops_early_is_found():
    with pytest.raises(BenchmarkError, match="ours did 2 steps, plain did 3"):
        require_equal_losses(PARTS["tiny"], {"plain": [_TRAINED], "ours": [replace(_TRAINED, losses=[7.0, 6.5])]})


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.usefixtures("real_samples")
def test_all_contenders_agree_on_the_losses_and_the_targets_come_last(tmp_path):
    # One thread: with as many as there are cores, whatever else runs slows all of them down many times.
    one_core = {min(os.sched_getaffinity(0))}
    parts = [word for part in ("phases", "tiny", "startup") for word in ("--part", part)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", "--quick", *parts],
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, one_core),
    )
    assert done.returncode == 0, done.stderr
    [phases] = [line for line in done.stdout.splitlines() if line.startswith("phases")]
    for phase in ("start", "import", "load", "tokenize", "train", "validate", "transfer", "save"):
        assert f" {phase} " in phases
    targets = [line.split() for line in done.stdout.splitlines()[-3:]]
    assert [(name, target) for name, _, target, _ in targets] == [
        ("tiny_vs_trainer", "1.5"),
        ("tiny_vs_best_other", "1.1"),
        ("startup_cpu_seconds", "6"),
    ]
    assert all(float(value) > 0 and word in ("ok", "short") for _, value, _, word in targets)
    assert list(tmp_path.iterdir()) == []
