"""Measures the memory that importing a Megatron-GPT archive of the published 1.3B shape takes, in both layouts.

Run `python -m benchmarks.megatron_import` from the project's root, on Linux. It writes archives of random fp16
values (2.6 GB each, three at a time) into a scratch folder and removes them. The last line is the target, as
`NAME VALUE TARGET ok|short`; a target that is short is no error.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import PROJECT, Target

_SETTINGS = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "encoder_seq_length": 2048,
    "max_position_embeddings": 2048,
    "num_layers": 24,
    "hidden_size": 2048,
    "ffn_hidden_size": 8192,
    "num_attention_heads": 16,
    "kv_channels": None,
    "apply_query_key_layer_scaling": True,
    "layernorm_epsilon": 1e-5,
    "make_vocab_size_divisible_by": 128,
    "bias_gelu_fusion": True,
    "precision": 16,
}
_TOKENS, _ROWS = 50257, 50304


@dataclass(frozen=True)
class Import:
    """One import in a process of its own: its largest resident memory, the weights that it wrote, its time."""

    layout: str
    peak: int
    weights: int
    seconds: float

    @property
    def ratio(self) -> float:
        return self.peak / self.weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the scratch folder is made; FEDSFT_HOME unless said")
    parser.add_argument("--step", nargs=3, metavar=("NAME", "SOURCE", "INTO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, source, into = args.step
        {"make": _make, "import": _import, "export": _export}[name](Path(source), Path(into))
        return
    home = args.folder or Path(os.environ.get("FEDSFT_HOME", PROJECT / ".fedsft"))
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="megatron-import-") as scratch:
        legacy, core, ours = (Path(scratch) / f"{name}.nemo" for name in ("legacy", "core", "ours"))
        _run("make", Path("-"), legacy)
        imports = [_measured(legacy, ours)]
        legacy.unlink()
        _run("export", ours, core)
        imports.append(_measured(core, ours))
    for done in imports:
        print(
            f"{done.layout}: {done.seconds:.1f} s, peak memory {done.peak / 1e9:.2f} GB for"
            f" {done.weights / 1e9:.2f} GB of weights written, {done.ratio:.2f} times"
        )
    worst = max(done.ratio for done in imports)
    print(Target("megatron_import_peak_memory", worst, 1.3))


def _measured(source: Path, into: Path) -> Import:
    started = time.perf_counter()
    said = json.loads(_run("import", source, into).splitlines()[-1])
    return Import(said["layout"], said["peak"], said["weights"], time.perf_counter() - started)


def _run(step: str, source: Path, into: Path) -> str:
    """Have a process of its own do a step, so that the memory of one is not that of another."""
    command = [sys.executable, "-m", "benchmarks.megatron_import", "--step", step, str(source), str(into)]
    return subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True).stdout


def _make(_: Path, into: Path) -> None:
    """A legacy archive of the shape that nemo_gpt1.3B_fp16.nemo has, one tensor at a time."""
    import torch
    import yaml

    from fedsft_assets.model.archive.archive_config import artifact_member
    from fedsft_assets.model.archive.nemo_archive import CONFIG, WEIGHTS
    from fedsft_assets.model.archive.tar_writer import new_tar, tar_member
    from fedsft_assets.model.archive.torch_reader import TensorInfo
    from fedsft_assets.model.archive.torch_writer import write_tensors
    from fedsft_assets.model.megatron.layout import LEGACY, PREFIX, GPTShape, weights

    shape = GPTShape(layers=24, hidden=2048, heads=16, ffn=8192, positions=2048, vocabulary=_ROWS)
    infos = {PREFIX[LEGACY] + weight.legacy: TensorInfo(torch.float16, weight.shape) for weight in weights(shape)}
    vocabulary, merges = _tokenizer()
    files = {artifact_member("vocab.json", vocabulary): vocabulary, artifact_member("merges.txt", merges): merges}
    names = dict(zip(("vocab_file", "merge_file"), (f"nemo:{name}" for name in files), strict=True))
    settings = {**_SETTINGS, "tokenizer": {"library": "megatron", "type": "GPT2BPETokenizer", **names}}
    torch.manual_seed(0)
    with new_tar(into) as file:
        for name, content in {**files, CONFIG: yaml.safe_dump(settings).encode()}.items():
            with tar_member(file, f"./{name}"):
                file.write(content)
        with tar_member(file, f"./{WEIGHTS}"):
            write_tensors(file, infos, lambda name: torch.randn(infos[name].shape).mul_(0.02).half())


def _tokenizer() -> tuple[bytes, bytes]:
    """As many tokens as GPT-2 has: bytes, pairs of bytes, and `<|endoftext|>`."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    pairs = [(one, other) for one in alphabet for other in alphabet][: _TOKENS - len(alphabet) - 1]
    tokens = [*alphabet, *(one + other for one, other in pairs), "<|endoftext|>"]
    vocabulary = json.dumps({token: index for index, token in enumerate(tokens)}).encode()
    return vocabulary, "\n".join(["#version: 0.2", *(f"{one} {other}" for one, other in pairs), ""]).encode()


def _export(source: Path, into: Path) -> None:
    from fedsft_assets.model.megatron.export import export_megatron

    export_megatron(source, into, "megatron-core")


def _import(source: Path, into: Path) -> None:
    from fedsft_assets.model.megatron.import_ import import_megatron

    report = import_megatron(source, into, 2048)
    status = Path("/proc/self/status").read_text()
    # Of this program alone: `ru_maxrss` starts with what the process that started it had.
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({"layout": report.layout, "peak": peak, "weights": report.bytes}))


if __name__ == "__main__":
    main()
