"""Whether a Hugging Face folder's weights are those of the model that its config.json describes.

Transformers takes much of what does not fit: it leaves out tensors that the model does not have, and takes
integers for numbers. Files are looked at before they are loaded, the model afterwards; each refusal names what it is.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.trainable import require_finite

_MOST_NAMED = 5
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_LARGEST_POINTER = 1024
# Each is looked for in this order, as transformers does; an index names the files of one model.
_SINGLE_OR_INDEX = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_FLOATS = {"F64", "F32", "F16", "BF16"}
_BIN_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# How weights may be quantized for transformers to make numbers of them again, exactly and without a GPU.
_DEQUANTIZED = ("fp8", "mxfp4")
_OTHER_PART = re.compile(r"(^|[._])(vision|visual|image|audio|multi_modal)[._]")
_EXPERT = re.compile(r"^(?P<layer>.*\bexperts\.)(?P<number>\d+)(?P<weight>\..+)$")
# Constants that old files hold: causal masks as matrices, and their value for what is masked, of no dimension.
_MASK = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias|causal_mask)$")


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of a weights file, without its values; `dtype` is named as in the safetensors format."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_stored(folder: Path) -> dict[str, TensorEntry]:
    """The tensors in the folder's weights files, by name.

    Raises ModelError if a file is missing, cannot be read, or is a Git LFS pointer, be it one of the tokenizer.
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
                " the file is damaged or was cut off: copy or download it again"
            ) from error
        stored.update(found)
    _require_whole_experts(folder, stored)
    return stored


def use_numbers(folder: Path, config: Any, stored: Mapping[str, TensorEntry]) -> None:
    """Have quantized weights loaded as the numbers that they stand for.

    Raises ModelError for weights that are quantized in another way, and for tensors that are no floating
    point numbers though config.json does not say that they are quantized.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        if method not in _DEQUANTIZED:
            raise ModelError(
                f"{folder}: config.json: quantization_config: quant_method: {method!r}: these weights are quantized;"
                f" expected {' or '.join(_DEQUANTIZED)}, which can be read as numbers, or the model's weights in"
                " bf16, fp16 or fp32"
            )
        quantization["dequantize"] = True
        return
    odd = {
        name: tensor for name, tensor in stored.items() if tensor.dtype not in _FLOATS and not _is_mask(name, tensor)
    }
    own = _integers_of_the_model(config) if odd else set()
    odd = {name: tensor for name, tensor in odd.items() if name.rpartition(".")[2] not in own}
    if odd:
        named = _listed(f"{name} is {tensor.dtype} in {tensor.file}" for name, tensor in odd.items())
        raise ModelError(
            f"{folder}: weights that are no floating point numbers: {named}; they seem to be quantized, and"
            " config.json has no quantization_config: bring the model's weights in bf16, fp16 or fp32"
        )


def _integers_of_the_model(config: Any) -> set[str]:
    """The last parts of the names of what the model itself has as integers, such as positions, or experts of tokens."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    tensors = [*lm.named_parameters(), *lm.named_buffers()]
    return {name.rpartition(".")[2] for name, tensor in tensors if not tensor.is_floating_point()}


def require_fit(
    folder: Path, config: Any, lm: Any, report: Mapping[str, Any], stored: Mapping[str, TensorEntry]
) -> list[str]:
    """Look at the loaded model, and at what transformers reports of the loading (`output_loading_info`).

    `config` is that of config.json. Where it is of a model for images and sound too, of which transformers takes the
    part for text, the names of the other tensors are returned. Raises ModelError that names tensors with other shapes,
    that are missing, that the model does not have, that are tied and differ, or that are not finite.
    """
    mismatched = sorted((name, tuple(found), tuple(wanted)) for name, found, wanted in report["mismatched_keys"])
    if mismatched:
        named = _listed(
            f"{name} has shape {found}{_in_file(stored, name)}, expected {wanted}" for name, found, wanted in mismatched
        )
        raise ModelError(
            f"{folder}: the weights are not those of the model that config.json describes: {named};"
            " bring config.json and weights of one model"
        )
    if report["missing_keys"]:
        raise ModelError(
            f"{folder}: the weights lack {_listed(sorted(report['missing_keys']))}, which the model that config.json"
            f" describes ({type(lm).__name__}) has; bring config.json and weights of one model"
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
        named = _listed(f"{name}{_in_file(stored, name)}" for name in unexpected)
        raise ModelError(
            f"{folder}: the weights hold what the model that config.json describes ({type(lm).__name__}) does not"
            f" have: {named}; bring config.json and weights of one model, without parts that are not trained here"
        )
    _require_ties(folder, lm, stored)
    require_finite(lm, lambda name: f"{folder}: {name}{_in_file(stored, name)}")
    return left_out


def _require_ties(folder: Path, lm: Any, stored: Mapping[str, TensorEntry]) -> None:
    for target, source in lm.get_expanded_tied_weights_keys(all_submodels=True).items():
        if lm.get_parameter(target) is not lm.get_parameter(source):
            raise ModelError(
                f"{folder}: config.json: tie_word_embeddings is true, so that {target} is {source}, but the weights"
                f" hold two that differ: {target}{_in_file(stored, target)}, {source}{_in_file(stored, source)};"
                f" set tie_word_embeddings to false if the model has both, or else remove {target} from the weights"
            )


def _require_whole_experts(folder: Path, stored: Mapping[str, TensorEntry]) -> None:
    """Experts that a file holds one by one become one tensor: each must have all weights, in one shape."""
    layers: dict[str, dict[str, dict[int, str]]] = {}
    for name in stored:
        if found := _EXPERT.match(name):
            layers.setdefault(found["layer"], {}).setdefault(found["weight"], {})[int(found["number"])] = name
    for layer, kinds in layers.items():
        numbers = {number for names in kinds.values() for number in names}
        for weight, names in kinds.items():
            lost = [f"{layer}{number}{weight}" for number in sorted(numbers - set(names))]
            if lost:
                raise ModelError(
                    f"{folder}: the weights lack {_listed(lost)}, which other experts have; bring all files"
                )
            shapes = Counter(stored[name].shape for name in names.values())
            usual, _ = shapes.most_common(1)[0]
            for name in names.values():
                if stored[name].shape != usual:
                    raise ModelError(
                        f"{folder}: {name}{_in_file(stored, name)} has shape {stored[name].shape}, other experts'"
                        f" have {usual}; bring the weights of one model"
                    )


def _weights_files(folder: Path) -> list[str]:
    for single, index in _SINGLE_OR_INDEX:
        if (folder / single).is_file():
            return [single]
        if (folder / index).is_file():
            return _indexed_files(folder, index)
    raise ModelError(
        f"{folder}: has no weights (*.safetensors or *.bin) by the names that save_pretrained gives:"
        f" {', '.join(name for names in _SINGLE_OR_INDEX for name in names)}"
    )


def _indexed_files(folder: Path, index: str) -> list[str]:
    try:
        places = json.loads((folder / index).read_bytes())["weight_map"]
        files: dict[str, list[str]] = {}
        for name, file in places.items():
            files.setdefault(file, []).append(name)
        outside = [file for file in files if Path(file).name != file]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{folder / index}: expected a weight_map from tensors to files: {error}") from error
    if outside:
        raise ModelError(f"{folder / index}: weight_map: {outside[0]!r} is not the name of a file of this folder")
    for file, names in sorted(files.items()):
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder}: {file} is missing, which should hold {len(names)} of the {len(places)} tensors that {index}"
                f" names ({_listed(sorted(names))}); copy or download it too"
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
            f"{path}: is a Git LFS pointer of {len(content)} bytes; the file that it stands for{real} was not"
            " downloaded: run `git lfs pull` in the repository that it is from"
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


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more
