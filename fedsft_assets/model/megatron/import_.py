"""Import of NeMo's Megatron-GPT archives, which may be untrusted: the same model, with GPT-2's names.

Weights are copied in their stored dtype, with one tensor in memory at a time. NeMo and Megatron are not needed.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fedsft_assets.model.archive.members import Archive, open_archive
from fedsft_assets.model.archive.nemo_archive import CONFIG, WEIGHTS, config_fields, weights_of, write_archive
from fedsft_assets.model.archive.torch_reader import TensorInfo, dtype_names
from fedsft_assets.model.errors import ModelError, listed
from fedsft_assets.model.megatron import dist_checkpoint_reader
from fedsft_assets.model.megatron.config import UNPADDED, MegatronGPT, gpt2_config, read_settings
from fedsft_assets.model.megatron.dist_checkpoint_reader import DistributedTensors
from fedsft_assets.model.megatron.layout import CORE, LEGACY, PREFIX, GPTShape, Layout, Weight, to_hf, weights
from fedsft_assets.model.megatron.tokenizer import hugging_face_tokenizer, read_tokenizer
from fedsft_assets.model.progress import ByteProgress
from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE
from fedsft_assets.model.tokenizer.files import tokenizer_files
from fedsft_assets.model.tokenizer.tiny import EOS
from fedsft_assets.model.trainable import require_finite_values

_TYPES = (torch.float16, torch.bfloat16, torch.float32)

# Prefixes of NeMo and Lightning before the names of a model's weights: `megatron_amp_O2` adds `module.`.
_BEFORE = re.compile(r"(?:(?:state_dict|model|module)\.)*(?=(?:language_model|embedding|decoder|output_layer)\.)")
_PARTS = re.compile(r"(?:^|/)(?:mp_rank|tp_rank)_\d+")
# States of fp8 layers and optimizers, which are not weights, and a trainer's plain values.
_HARMLESS = re.compile(r"(?:^|.*\.)_extra_state(?:/.*)?|(?:chained_\d+\.)?optimizer(?:_states)?[./].*")
_PLAIN_VALUES = ("NoneType", "int", "float", "str", "bool", "list", "tuple")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImportReport:
    """Description of an imported model: `bytes` is the size of the weights written, `tokens` counts the tokenizer's
    tokens, `shape.vocabulary` the token table's rows, often padded to a multiple of 128."""

    layout: Layout
    shape: GPTShape
    tokens: int
    max_length: int
    activation: str
    types: tuple[str, ...]
    bytes: int

    @property
    def parameters(self) -> int:
        return self.shape.parameters


class Weights(Protocol):
    """The common interface of both kinds of checkpoint."""

    tensors: dict[str, TensorInfo]
    non_tensors: dict[str, str]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor: ...


def is_megatron(settings: Mapping[str, Any]) -> bool:
    """Whether a `model_config.yaml` with this content is from Megatron, not from this project."""
    return not _is_own(settings) and "num_layers" in settings and "hidden_size" in settings


def _is_own(settings: Mapping[str, Any]) -> bool:
    return "hf" in settings


def import_megatron(
    source: Path,
    into: Path,
    max_length: int,
    prompt_template: str = DEFAULT_TEMPLATE,
    expect: Mapping[str, int] | None = None,
) -> ImportReport:
    """Write the model of a Megatron archive, or a folder of its files, as the archive `into`.

    `max_length` is limited to the model's positions. `expect` has required values of settings, such as
    `num_layers`. Raises ModelError that names the archive and the problem, and then leaves `into` unchanged.
    """
    with open_archive(source, scratch=into.parent) as opened:
        return import_opened(opened, into, max_length, prompt_template, expect)


def import_opened(
    source: Archive,
    into: Path,
    max_length: int,
    prompt_template: str = DEFAULT_TEMPLATE,
    expect: Mapping[str, int] | None = None,
) -> ImportReport:
    """`import_megatron` for an open archive."""
    settings = config_fields(source)
    if _is_own(settings):
        raise ModelError(f"{source.path}: is an archive of this project, not of Megatron; use it without importing")
    where = f"{source.path}: {CONFIG}"
    for name, value in (expect or {}).items():
        if settings.get(name) != value:
            raise ModelError(f"{where}: {name}: {settings.get(name)!r} is not the {value} of the preset")
    model = read_settings(settings, where)
    tokenizer = read_tokenizer(source, settings)
    with _weights(source) as tensors:
        rows = settings.get(UNPADDED)
        return _convert(source, tensors, model, tokenizer, rows, into, max_length, prompt_template)


def _convert(
    source: Archive,
    tensors: Weights,
    model: MegatronGPT,
    bpe: Tokenizer,
    token_rows: int | None,
    into: Path,
    max_length: int,
    prompt_template: str,
) -> ImportReport:
    layout, names = _names(source, tensors)
    shape = _shape(source, model, bpe, {key: tensors.tensors[name] for key, name in names.items()})
    sources = {
        f"lm.{weight.hf}": (weight, *_source(source, tensors, weight, layout, shape.layers, names))
        for weight in weights(shape)
    }
    _require_known(source, tensors, {name for _, name, _ in sources.values()})
    shape = replace(shape, vocabulary=_unpadded(source, shape, bpe, token_rows))
    infos = {
        f"lm.{weight.hf}": TensorInfo(tensors.tensors[sources[f"lm.{weight.hf}"][1]].dtype, weight.hf_shape)
        for weight in weights(shape)
    }
    word, head = "lm.transformer.wte.weight", "lm.lm_head.weight"
    total = sum(info.nbytes for info in infos.values())
    if total > source.size:
        raise ModelError(f"{source.path}: its weights need {total} bytes, but its files have only {source.size}")
    progress = ByteProgress(total, "converted")

    def read(name: str) -> Tensor:
        weight, found, rows = sources[name]
        tensor = tensors.read(found, (0, shape.vocabulary) if name == word else rows)
        require_finite_values(f"{source.path}: {found}", tensor)
        progress.add(infos[name].nbytes)
        return to_hf(weight, tensor[0] if rows else tensor, shape.heads)

    report = ImportReport(
        layout=layout,
        shape=shape,
        tokens=bpe.get_vocab_size(),
        max_length=min(max_length, shape.positions),
        activation=model.activation,
        types=dtype_names(infos.values()),
        bytes=total,
    )
    _log.info(
        "%s: %s layout, %s parameters in %s", source.path, layout, f"{report.parameters:,}", ", ".join(report.types)
    )
    write_archive(
        into,
        {
            "hf": gpt2_config(model, shape.positions, shape.vocabulary, bpe.token_to_id(EOS)),
            "max_length": report.max_length,
            "prompt_template": prompt_template,
        },
        tokenizer_files(hugging_face_tokenizer(bpe)),
        {**infos, head: infos[word]},
        read,
        {head: word},
    )
    return report


@contextmanager
def _weights(source: Archive) -> Iterator[Weights]:
    """Open the checkpoint in an archive. Raises ModelError if it is missing, partitioned, or in the zarr format."""
    if zarr := next((name for name in source.members if name.endswith(".zarray")), None):
        raise ModelError(
            f"{source.path}: {zarr}: the weights are in the zarr format, which is not supported; load the checkpoint"
            " with the NeMo that wrote it, set dist_ckpt_format: torch_dist, and save it again"
        )
    parts = sorted({found[0].strip("/") for name in source.members if (found := _PARTS.search(name))})
    if parts:
        raise ModelError(
            f"{source.path}: {', '.join(parts[:4])}: the model is partitioned, which is not supported;"
            " merge it into one partition with NeMo's megatron_change_num_partitions.py"
        )
    if WEIGHTS in source.members:
        with weights_of(source) as tensors:
            yield tensors
    elif dist_checkpoint_reader.METADATA in source.members:
        yield DistributedTensors(source)
    else:
        raise ModelError(
            f"{source.path}: has neither {WEIGHTS} nor {dist_checkpoint_reader.METADATA}; not a Megatron archive, or"
            " truncated"
        )


def _names(source: Archive, tensors: Weights) -> tuple[Layout, dict[str, str]]:
    """The layout, and the full name of each tensor by its name in that layout."""
    layout: Layout = LEGACY if any("language_model." in name for name in tensors.tensors) else CORE
    names: dict[str, str] = {}
    for name in tensors.tensors:
        if _HARMLESS.fullmatch(name):
            continue
        key = name[found.end() :] if (found := _BEFORE.match(name)) else name
        key = key.removeprefix("language_model.") if layout == LEGACY else key
        if key in names:
            raise ModelError(f"{source.path}: {name} and {names[key]} are the same weight")
        names[key] = name
    return layout, names


def _shape(source: Archive, model: MegatronGPT, bpe: Tokenizer, found: Mapping[str, TensorInfo]) -> GPTShape:
    """The sizes of the model: those in the settings, and the rows of the tables in the weights."""
    rows = {}
    for field, name in (("vocabulary", "word_embeddings"), ("positions", "position_embeddings")):
        info = found.get(f"embedding.{name}.weight")
        if info is None or len(info.shape) != 2:
            raise ModelError(
                f"{source.path}: has no tensor {name}.weight of two dimensions; not a Megatron-GPT archive"
            )
        rows[field] = info.shape[0]
    if rows["vocabulary"] < bpe.get_vocab_size():
        raise ModelError(
            f"{source.path}: word_embeddings.weight has {rows['vocabulary']} rows,"
            f" but the tokenizer has {bpe.get_vocab_size()} tokens"
        )
    if rows["positions"] not in model.positions or rows["positions"] < 2:
        raise ModelError(
            f"{source.path}: position_embeddings.weight has {rows['positions']} rows, but {CONFIG} says"
            f" {' and '.join(map(str, model.positions))} (max_position_embeddings, encoder_seq_length)"
        )
    return GPTShape(
        layers=model.layers, hidden=model.hidden, heads=model.heads, ffn=model.ffn,
        positions=rows["positions"], vocabulary=rows["vocabulary"],
    )  # fmt: skip


def _unpadded(source: Archive, shape: GPTShape, bpe: Tokenizer, rows: int | None) -> int:
    """The token table's rows without the padding of this project's export; all rows in NeMo's own archives."""
    if rows is None:
        return shape.vocabulary
    if type(rows) is not int or not bpe.get_vocab_size() <= rows <= shape.vocabulary:
        raise ModelError(
            f"{source.path}: {CONFIG}: {UNPADDED}: expected a number from {bpe.get_vocab_size()} (tokens)"
            f" to {shape.vocabulary} (rows), found {rows!r}"
        )
    return rows


def _source(
    source: Archive, tensors: Weights, weight: Weight, layout: Layout, layers: int, names: Mapping[str, str]
) -> tuple[str, tuple[int, int] | None]:
    """The name of the tensor with a weight, and the weight's rows in it if it stacks all layers."""
    found = [names[name] for name in weight.names(layout) if name in names]
    stacked = [names[name] for name in weight.stacked_names(layout) if name in names]
    if len(found) + len(stacked) != 1:
        problem = f"occurs as {' and as '.join([*found, *stacked])}" if found or stacked else "is missing"
        raise ModelError(f"{source.path}: {PREFIX[layout]}{weight.names(layout)[0]} {problem}")
    name = (found or stacked)[0]
    info = tensors.tensors[name]
    if info.dtype not in _TYPES:
        raise ModelError(f"{source.path}: {name}: {info.dtype} is not one of {', '.join(map(str, _TYPES))}")
    expected = weight.shape if found else (layers, *weight.shape)
    if info.shape != expected:
        raise ModelError(
            f"{source.path}: {name} has shape {info.shape}, expected {expected} by {CONFIG} and the tables"
        )
    return name, None if found or weight.layer is None else (weight.layer, weight.layer + 1)


def _require_known(source: Archive, tensors: Weights, used: set[str]) -> None:
    """Raise ModelError if there are unused values that could be part of the model."""
    unused = [name for name in tensors.tensors if name not in used and not _HARMLESS.fullmatch(name)]
    unused += [
        name
        for name, kind in tensors.non_tensors.items()
        if not _HARMLESS.fullmatch(name) and kind not in _PLAIN_VALUES
    ]
    if any(name.endswith("output_layer.weight") for name in unused):
        raise ModelError(
            f"{source.path}: output_layer.weight: the output layer is not tied to the token table, as GPT-2 requires"
        )
    if unused:
        raise ModelError(f"{source.path}: has tensors that GPT-2 does not have: {listed(unused)}")
