"""Any archive of ours made into a Hugging Face folder, for `AutoModelForCausalLM` and `AutoTokenizer`.

The same values bit for bit, in the type that they have, written tensor by tensor in the safetensors format, under the
names and in the words that transformers 4.57 and 5 both read.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from fedsft_assets.files import publish_folder
from fedsft_assets.model.archive.nemo_archive import CONFIG, WEIGHTS, open_weights, read_config, read_tokenizer_files
from fedsft_assets.model.archive.torch_reader import TensorInfo, dtype_names
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import end_tokens
from fedsft_assets.model.huggingface.config import TOKENIZER_CONFIG, tokenizer_config, write_config
from fedsft_assets.model.huggingface.weights import PublishedWeights
from fedsft_assets.model.progress import ByteProgress

_SHARD = 5_000_000_000
# Names of types in the safetensors format: https://github.com/huggingface/safetensors#format
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class HuggingFaceReport:
    """What was exported: `files` are those of the weights, and `bytes` their tensors'."""

    architecture: str
    parameters: int
    types: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int


def export_huggingface(
    archive: Path, into: Path, shard: int = _SHARD, say: Callable[[str], object] = lambda _: None
) -> HuggingFaceReport:
    """Write the model, its tokenizer and its settings for generation as the new folder `into`, whole or not at all.

    A file of weights has up to `shard` bytes of tensors, or one tensor. `say` gets lines of progress.
    Raises ModelError if there is something at `into`, or the archive cannot be read.
    """
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ModelError(f"{into}: is there already; name a new folder, or remove it first")
    config = read_config(archive)
    tokenizer_files = read_tokenizer_files(archive, config)
    hf = _configuration(config["hf"], f"{archive}: {CONFIG}")
    with open_weights(archive) as tensors:
        _require_common_types(tensors.tensors, f"{archive}: {WEIGHTS}")
        weights = PublishedWeights(config["hf"], tensors, f"{archive}: {WEIGHTS}")
        infos = weights.infos
        hf.dtype = _main_type(infos.values())
        shards = _shards(infos, shard)
        with publish_folder(into) as fresh:
            for name, content in tokenizer_files.items():
                (fresh / name).write_bytes(tokenizer_config(content) if name == TOKENIZER_CONFIG else content)
            _generation(hf, fresh, f"{archive}: the tokenizer's files").save_pretrained(fresh)
            write_config(hf, fresh, f"{archive}: {CONFIG}")
            _write_weights(fresh, weights, shards, say)
    return HuggingFaceReport(
        architecture=hf.architectures[0],
        parameters=sum(prod(info.shape) for info in infos.values()),
        types=dtype_names(infos.values()),
        files=tuple(shards),
        bytes=sum(info.nbytes for info in infos.values()),
    )


def _configuration(described: Mapping[str, Any], where: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(described["model_type"])
    if architecture is None:
        raise ModelError(f"{where}: hf.model_type: {described['model_type']!r} is not a causal language model")
    try:
        config = AutoConfig.for_model(**described)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{where}: hf: {error}") from error
    config.architectures = [architecture]
    return config


def _require_common_types(infos: Mapping[str, TensorInfo], where: str) -> None:
    for name, info in infos.items():
        if info.dtype not in _TYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _TYPES)
            raise ModelError(
                f"{where}: {name}: {info.dtype}: has no form in the safetensors format; one of {known} has"
            )


def _main_type(infos: Iterable[TensorInfo]) -> torch.dtype:
    """The type of most values, in which `from_pretrained` loads all of them unless told otherwise."""
    values: dict[torch.dtype, int] = {}
    for info in infos:
        if info.dtype.is_floating_point:
            values[info.dtype] = values.get(info.dtype, 0) + prod(info.shape)
    return max(values, key=values.__getitem__)


def _shards(infos: Mapping[str, TensorInfo], most: int) -> dict[str, list[str]]:
    """Names of tensors by the file that they go into."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, info in infos.items():
        if parts[-1] and size + info.nbytes > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += info.nbytes
    if len(parts) == 1:
        return {"model.safetensors": parts[0]}
    return {f"model-{number:05}-of-{len(parts):05}.safetensors": part for number, part in enumerate(parts, 1)}


def _write_weights(
    folder: Path, weights: PublishedWeights, shards: Mapping[str, list[str]], say: Callable[[str], object]
) -> None:
    total = sum(info.nbytes for info in weights.infos.values())
    progress = ByteProgress(total, "written", say)
    tensors = weights.each()
    for file_name, names in shards.items():
        with (folder / file_name).open("wb") as file:
            file.write(_header({name: weights.infos[name] for name in names}))
            for name in names:
                found, tensor = next(tensors)
                assert found == name, "files are filled in the order of the tensors"
                file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
                progress.add(tensor.nbytes)
                del tensor
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in shards.items() for name in names},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(infos: Mapping[str, TensorInfo]) -> bytes:
    """What a safetensors file begins with: the header's length, and where each tensor is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in infos.items():
        start, end = end, end + info.nbytes
        header[name] = {"dtype": _TYPES[info.dtype], "shape": info.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _generation(hf: Any, tokenizer_folder: Path, where: str) -> Any:
    """How to generate: every EOS ends an answer, and padded rows of the token table are never chosen."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelError(f"{where} cannot be read: {error}") from error
    ends = end_tokens(tokenizer.eos_token_id, hf.eos_token_id)
    padded = range(max(tokenizer.get_vocab().values()) + 1, hf.get_text_config().vocab_size)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        suppress_tokens=list(padded) or None,
    )
