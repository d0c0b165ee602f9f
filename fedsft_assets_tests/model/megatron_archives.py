"""Megatron-GPT archives as NeMo writes them, small and random, and what Megatron computes with them."""

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import yaml
from tokenizers import pre_tokenizers
from torch import Tensor

from fedsft_assets.model.megatron.layout import LEGACY, PREFIX, GPTShape, Layout, weights

SHAPE = GPTShape(layers=3, hidden=24, heads=3, ffn=96, positions=32, vocabulary=384)
VOCABULARY = {
    token: index
    for index, token in enumerate(
        [*sorted(pre_tokenizers.ByteLevel.alphabet()), "in", "ing", "Ġt", "Ġth", "<|endoftext|>"]
    )
}
MERGES = "#version: 0.2\ni n\nin g\nĠ t\nĠt h\n"
VOCAB_FILE, MERGES_FILE = "c4aa5af8f4e04a07b316303adb6e5742_vocab.json", "9c098a27074f4e09a7d4692612c706a0_merges.txt"
# What NeMo 1.11 said of a model in 2022, without the settings that came later.
SETTINGS: dict[str, Any] = {
    "micro_batch_size": 2,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "encoder_seq_length": SHAPE.positions,
    "max_position_embeddings": SHAPE.positions,
    "num_layers": SHAPE.layers,
    "hidden_size": SHAPE.hidden,
    "ffn_hidden_size": SHAPE.ffn,
    "num_attention_heads": SHAPE.heads,
    "init_method_std": 0.02,
    "hidden_dropout": 0.1,
    "kv_channels": None,
    "apply_query_key_layer_scaling": True,
    "layernorm_epsilon": 1e-5,
    "make_vocab_size_divisible_by": 128,
    "bias_gelu_fusion": True,
    "masked_softmax_fusion": True,
    "tokenizer": {
        "library": "megatron",
        "type": "GPT2BPETokenizer",
        "model": None,
        "vocab_file": f"nemo:{VOCAB_FILE}",
        "merge_file": f"nemo:{MERGES_FILE}",
        "delimiter": None,
    },
    "megatron_amp_O2": False,
    "precision": 16,
    "optim": {"name": "fused_adam", "lr": 2e-4},
    "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
}

Members = dict[str, bytes]


def random_tensors(layout: Layout, dtype: torch.dtype = torch.float32, shape: GPTShape = SHAPE) -> dict[str, Tensor]:
    """Values that leave no part of a layer without effect, the same in both layouts, under a layout's own names."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for weight in weights(shape):
        values = torch.randn(weight.shape, generator=generator) * (0.3 if len(weight.shape) > 1 else 0.5)
        tensors[PREFIX[layout] + weight.names(layout)[0]] = values.to(dtype)
    return tensors


def stacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of Megatron-core's layers, stacked along a first dimension as its checkpoints have them."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".layers.0." in name:
            layers = [tensors[name.replace(".layers.0.", f".layers.{layer}.")] for layer in range(SHAPE.layers)]
            found[name.replace(".layers.0.", ".layers.")] = torch.stack(layers)
        elif ".layers." not in name:
            found[name] = tensor
    return found


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def members(settings: Mapping[str, Any], content: object = None) -> Members:
    """The files of an archive, with the content of its `model_weights.ckpt`, if it has one."""
    files = {
        "model_config.yaml": yaml.safe_dump(dict(settings)).encode(),
        VOCAB_FILE: json.dumps(VOCABULARY).encode(),
        MERGES_FILE: MERGES.encode(),
    }
    return {**files, **({"model_weights.ckpt": saved(content)} if content is not None else {})}


def distributed(tensors: Mapping[str, Tensor], folder: Path) -> Members:
    """The files of a distributed checkpoint, written by torch, as they are in an archive."""
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return {f"model_weights/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


def write_tar(path: Path, files: Members, entries: tuple[tarfile.TarInfo, ...] = (), mode: str = "w") -> Path:
    """A tar of these files as NeMo packs them, and of further entries."""
    with tarfile.open(path, mode) as tar:
        top = tarfile.TarInfo("./")
        top.type = tarfile.DIRTYPE
        tar.addfile(top)
        for name, content in files.items():
            entry = tarfile.TarInfo(f"./{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
        for entry in entries:
            tar.addfile(entry, io.BytesIO(b"\0" * entry.size) if entry.isreg() else None)
    return path


def write_folder(path: Path, files: Members) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def megatron_logits(tensors: Mapping[str, Tensor], ids: Tensor, shape: GPTShape, exact_gelu: bool) -> Tensor:
    """What Megatron computes with the tensors of a legacy archive: (batch, length) ids to logits, in float64.

    Written after `ParallelTransformerLayer`, `ParallelAttention` and `ParallelMLP` of NeMo 1, which have
    queries, keys and values side by side for each head.
    """
    values = {name.removeprefix(PREFIX[LEGACY]): tensor.double() for name, tensor in tensors.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ values[f"{name}.weight"].T + values[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], values[f"{name}.weight"], values[f"{name}.bias"], 1e-5)

    batch, length = ids.shape
    word = values["embedding.word_embeddings.weight"]
    x = word[ids] + values["embedding.position_embeddings.weight"][:length]
    for layer in range(shape.layers):
        block = f"encoder.layers.{layer}"
        mixed = linear(f"{block}.self_attention.query_key_value", norm(f"{block}.input_layernorm", x))
        query, key, value = mixed.view(batch, length, shape.heads, -1).transpose(1, 2).chunk(3, dim=-1)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        context = scores.masked_fill(future, -torch.inf).softmax(-1) @ value
        x = x + linear(f"{block}.self_attention.dense", context.transpose(1, 2).reshape(batch, length, -1))
        inner = linear(f"{block}.mlp.dense_h_to_4h", norm(f"{block}.post_attention_layernorm", x))
        inner = F.gelu(inner, approximate="none" if exact_gelu else "tanh")
        x = x + linear(f"{block}.mlp.dense_4h_to_h", inner)
    return norm("encoder.final_layernorm", x) @ word.T
