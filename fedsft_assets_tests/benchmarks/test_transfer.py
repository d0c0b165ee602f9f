import os
import subprocess
import sys
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from benchmarks.transfer.__main__ import BF16, SIZES, Note, Run, run_figures, size_targets
from benchmarks.transfer.job import Exchange
from benchmarks.transfer.model import Shape, Weights, random_tensors
from benchmarks.transfer.watch import Peaks
from fedsft_assets.settings import PROJECT

_SMALL = Shape(layers=1, width=8, vocabulary=11, positions=4)


def test_sizes_are_those_that_they_are_called():
    for size, shape in SIZES.items():
        if size != "tiny":
            travels = shape.parameters * (2 if size == BF16 else 4)
            assert travels / 1e9 == pytest.approx(float(size), rel=0.03)


def test_tensors_have_gpt2s_names_and_shapes():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=4, vocab_size=11)
    state = {name.removeprefix("transformer."): tensor for name, tensor in GPT2LMHeadModel(config).named_parameters()}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == _SMALL.tensors()


def test_both_ways_begin_with_the_same_numbers():
    import torch

    ours = dict(random_tensors(_SMALL, torch.float32, seed=0))
    stock = {name.replace("/", "."): tensor for name, tensor in Weights(1, 8, 11, 4, "float32").named_parameters()}
    assert ours.keys() == stock.keys()
    assert all(torch.equal(tensor, stock[name]) for name, tensor in ours.items())
    assert sum(prod(tensor.shape) for tensor in ours.values()) == _SMALL.parameters


def test_figures_are_those_of_the_rounds_after_the_first():
    """Two sites; the second round's model is on its way for 4 s, its results for 8 s."""
    exchange = Exchange(_SMALL, sites=2, rounds=2, bf16=False)
    notes = {
        "site-1": [
            Note("idle", 0, 0, 0, 100),
            Note("down", 0, 0, 9, 0),
            Note("down", 1, 20, 22, 0),
            Note("up", 1, 25, 30, 0),
        ],
        "site-2": [
            Note("idle", 0, 0, 0, 120),
            Note("down", 0, 0, 10, 0),
            Note("down", 1, 21, 24, 0),
            Note("up", 1, 26, 33, 0),
        ],
    }
    run = run_figures("ours", "0.5", exchange, Peaks(), notes)
    both_sites = 2 * 4 * _SMALL.parameters
    assert (run.seconds, run.down, run.up, run.idle) == (14, both_sites / 4, both_sites / 8, 120)
    assert run.both == pytest.approx(2 * both_sites / 12)


def test_targets_compare_memory_with_the_model_as_it_is_held():
    exchange = Exchange(_SMALL, sites=3, rounds=2, bf16=True)
    held = 4 * _SMALL.parameters
    peaks = Peaks(
        each={"server": 2 * held, "trainer site-1": held + 50, "trainer site-2": held, "site site-1": 9},
        together=23 * 10**9,
    )
    ours = Run("ours", BF16, exchange, peaks, 50, 1.0, 400.0, 400.0)
    stock = Run("stock", BF16, exchange, peaks, 50, 1.0, 200.0, 200.0)
    assert [str(target) for target in size_targets(BF16, [ours], [stock])] == [
        "transfer_2.6_vs_stock 2.00 1.5 ok",
        "transfer_2.6_server_memory 2.00 3 ok",
        "transfer_2.6_site_memory 1.00 1.5 ok",
        "transfer_2.6_gb_together 23.00 24 ok",
    ]
    assert [str(target) for target in size_targets(BF16, [], [stock])] == ["transfer_2.6_gb_together inf 24 short"]


@pytest.mark.slow
def test_a_tiny_model_is_exchanged_both_ways_and_the_targets_come_last():
    with TemporaryDirectory(prefix="fedsft-") as folder:  # by a short name: NVFlare's processes have sockets in it
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.transfer", "--quick", "--rounds", "2"],
            cwd=PROJECT,
            env={**os.environ, "TMPDIR": folder},
            capture_output=True,
            text=True,
            check=False,
        )
        left = [*Path(folder).iterdir()]
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:3] for line in lines if line.startswith("tiny")] == [
        ["tiny", "ours", "3"],
        ["tiny", "stock", "3"],
    ]
    processes = next(line for line in lines if "trainer site-1" in line)
    assert all(name in processes for name in ("server ", "site site-3 ", "trainer site-3 "))
    assert [line.split()[0] for line in lines[-3:]] == [
        "transfer_tiny_vs_stock",
        "transfer_tiny_server_memory",
        "transfer_tiny_site_memory",
    ]
    assert left == []
