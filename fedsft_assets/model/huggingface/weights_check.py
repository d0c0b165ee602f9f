"""Check that a Hugging Face folder's weights belong to the model that its config.json describes.

Transformers accepts much that does not fit: it skips tensors that a model does not have, and loads integers as floats.
Here, files are checked before loading and the model afterwards, with errors that name the offending tensors.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsft_assets.model.errors import ModelError, listed
from fedsft_assets.model.trainable import require_finite

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_POINTER = 1024  # bytes
# Searched in this order, as transformers does; an index lists the files of one model.
_SINGLE_OR_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_FLOATS = {"F64", "F32", "F16", "BF16"}
_BIN_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# Quantization methods that transformers can reverse exactly, without a GPU.
_DEQUANTIZED = ("fp8", "mxfp4")
_OTHER_PART = re.compile(r"(^|[._])(vision|visual|image|audio|multi_modal)[._]")
_EXPERT = re.compile(r"^(?P<layer>.*\bexperts\.)(?P<number>\d+)(?P<weight>\..+)$")
# Constants in old files: causal mask matrices, and the scalar value of masked positions.
_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a weights file, without values; `dtype` is named as in the safetensors format."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_stored(folder: Path) -> dict[str, TensorEntry]:
    """The tensors in the folder's weights files, by name.

    Raises ModelError if a weights file is missing or unreadable, or if any file of the folder is a Git LFS pointer.
    """
    for path in sorted(folder.iterdir()):
        _refuse_pointer(path)
    stored: dict[str, TensorEntry] = {}
    for name in _weights_files(folder):
        path = folder / name
        try:
            found = _safetensors(path) if name.endswith(".safetensors") else _torch_checkpoint(path)
        except Exception as error:  # safetensors and torch raise errors of many kinds for a damaged file
            raise ModelError(
                f"{path}: the weights cannot be read: {type(error).__name__}: {error};"
                " the file is damaged or truncated: copy or download it again"
            ) from error
        stored.update(found)
    _require_complete_experts(folder, stored)
    return stored


def use_numbers(folder: Path, config: Any, stored: Mapping[str, TensorEntry]) -> None:
    """Configure quantized weights to be dequantized on loading.

    Raises ModelError for unsupported quantization methods, and for tensors that are not floating point although
    config.json declares no quantization.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method not in _DEQUANTIZED:
            raise ModelError(
                f"{folder}: config.json: quantization_config: quant_method: {method!r}: these weights are quantized;"
                f" expected {' or '.join(_DEQUANTIZED)}, which can be dequantized, or the model's weights in"
                " bf16, fp16 or fp32"
            )
        quantization["dequantize"] = True
        return
    integers = {
        name: tensor for name, tensor in stored.items() if tensor.dtype not in _FLOATS and not _is_mask(name, tensor)
    }
    expected = _integer_tensors(config) if integers else set()
    unexpected = {name: tensor for name, tensor in integers.items() if name.rpartition(".")[2] not in expected}
    if unexpected:
        named = listed(f"{name} is {tensor.dtype} in {tensor.file}" for name, tensor in unexpected.items())
        raise ModelError(
            f"{folder}: weights that are not floating point numbers: {named}; they seem to be quantized, but"
            " config.json has no quantization_config: use the model's weights in bf16, fp16 or fp32"
        )


def _integer_tensors(config: Any) -> set[str]:
    """The last name parts of the model's own integer tensors, such as positions, or experts of tokens."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tensors = [*lm.named_parameters(), *lm.named_buffers()]
    return {name.rpartition(".")[2] for name, tensor in tensors if not tensor.is_floating_point()}


def require_fit(
    folder: Path, config: Any, lm: Any, report: Mapping[str, Any], stored: Mapping[str, TensorEntry]
) -> list[str]:
    """Check the loaded model and transformers' loading report (`output_loading_info`).

    `config` is that of config.json. If it describes a multimodal model, of which transformers loads only the text part,
    returns the names of the skipped tensors. Raises ModelError that names tensors with other shapes, missing and
    unexpected tensors, tied tensors that differ, and tensors that are not finite.
    """
    mismatched = sorted((name, tuple(found), tuple(expected)) for name, found, expected in report["mismatched_keys"])
    if mismatched:
        named = listed(
            f"{name} has shape {found}{_in_file(stored, name)}, expected {expected}"
            for name, found, expected in mismatched
        )
        raise ModelError(
            f"{folder}: the weights are not those of the model that config.json describes: {named};"
            " use config.json and weights of the same model"
        )
    if report["missing_keys"]:
        raise ModelError(
            f"{folder}: the weights lack {listed(sorted(report['missing_keys']))}, which the model that config.json"
            f" describes ({type(lm).__name__}) has; use config.json and weights of the same model"
        )
    buffers = {name for name, _ in lm.named_buffers()}
    unexpected = [
        name
        for name in sorted(report["unexpected_keys"])
        if name not in buffers and not (name in stored and _is_mask(name, stored[name]))
    ]
    left_out = [name for name in unexpected if type(lm.config) is not type(config) and _OTHER_PART.search(name)]
    unexpected = [name for name in unexpected if name not in left_out]
    if unexpected:
        named = listed(f"{name}{_in_file(stored, name)}" for name in unexpected)
        raise ModelError(
            f"{folder}: the weights have tensors that the model in config.json ({type(lm).__name__}) does not"
            f" have: {named}; use config.json and weights of the same model, without parts that are not trained here"
        )
    _require_ties(folder, lm, stored)
    require_finite(lm, lambda name: f"{folder}: {name}{_in_file(stored, name)}")
    return left_out


def _require_ties(folder: Path, lm: Any, stored: Mapping[str, TensorEntry]) -> None:
    for target, source in lm.get_expanded_tied_weights_keys(all_submodels=True).items():
        if lm.get_parameter(target) is not lm.get_parameter(source):
            raise ModelError(
                f"{folder}: config.json: tie_word_embeddings is true, so that {target} is {source}, but they differ in"
                f" the weights: {target}{_in_file(stored, target)}, {source}{_in_file(stored, source)};"
                f" set tie_word_embeddings to false if the model has both, or else remove {target} from the weights"
            )


def _require_complete_experts(folder: Path, stored: Mapping[str, TensorEntry]) -> None:
    """Raise ModelError if separately stored experts, which become one tensor, differ in weights or shapes."""
    layers: dict[str, dict[str, dict[int, str]]] = {}
    for name in stored:
        if found := _EXPERT.match(name):
            layers.setdefault(found["layer"], {}).setdefault(found["weight"], {})[int(found["number"])] = name
    for layer, kinds in layers.items():
        numbers = {number for names in kinds.values() for number in names}
        for weight, names in kinds.items():
            missing = [f"{layer}{number}{weight}" for number in sorted(numbers - set(names))]
            if missing:
                raise ModelError(
                    f"{folder}: the weights lack {listed(missing)}, which other experts have; add all files"
                )
            shapes = Counter(stored[name].shape for name in names.values())
            usual, _ = shapes.most_common(1)[0]
            for name in names.values():
                if stored[name].shape != usual:
                    raise ModelError(
                        f"{folder}: {name}{_in_file(stored, name)} has shape {stored[name].shape}, other experts'"
                        f" have {usual}; use the weights of one model"
                    )


def _weights_files(folder: Path) -> list[str]:
    for single, index in _SINGLE_OR_INDEX:
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file():
            return _indexed_files(folder, index)
    raise ModelError(
        f"{folder}: has no weights file named as save_pretrained does:"
        f" {', '.join(name for names in _SINGLE_OR_INDEX for name in names)}"
    )


def _indexed_files(folder: Path, index: str) -> list[str]:
    try:
        weight_map = json.loads((folder / index).read_bytes())["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(file, []).append(name)
        outside = [file for file in files if Path(file).name != file]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder / index}: expected a weight_map from tensors to files: {error}") from error
    if outside:
        raise ModelError(f"{folder / index}: weight_map: {outside[0]!r} is not the name of a file in this folder")
    for file, names in sorted(files.items()):
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder}: {file} is missing, with {len(names)} of the {len(weight_map)} tensors in {index}"
                f" ({listed(sorted(names))}); copy or download it too"
            )
    return sorted(files)


def _refuse_pointer(path: Path) -> None:
    if not path.is_file() or path.stat().st_size > _LARGEST_POINTER:
        return
    content = path.read_bytes()
    if content.startswith(_LFS_POINTER):
        size = re.search(rb"^size (\d+)$", content, re.MULTILINE)
        real = f", of {int(size[1]):,} bytes," if size else ""
        raise ModelError(
            f"{path}: is a Git LFS pointer of {len(content)} bytes; the file that it points to{real} was not"
            " downloaded: run `git lfs pull` in its repository"
        )


def _safetensors(path: Path) -> dict[str, TensorEntry]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 it is no dictionary
        return {
            name: TensorEntry(path.name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
        }


def _torch_checkpoint(path: Path) -> dict[str, TensorEntry]:
    tensors = torch.load(path, map_location="meta", weights_only=True)
    return {
        name: TensorEntry(path.name, _BIN_TYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }


def _is_mask(name: str, tensor: TensorEntry) -> bool:
    return len(tensor.shape) != 1 and _MASK.search(name) is not None


def _in_file(stored: Mapping[str, TensorEntry], name: str) -> str:
    return f" in {stored[name].file}" if name in stored else ""
