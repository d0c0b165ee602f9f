"""Export of this project's archives as Hugging Face folders for `AutoModelForCausalLM` and `AutoTokenizer`.

Values are preserved bit for bit, in their stored dtype, and written tensor by tensor in the safetensors format, under
names that transformers 4.57 and 5 both read.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, constants, split_state_dict_into_shards_factory

from fedsft_assets.files import publish_folder
from fedsft_assets.model.archive.nemo_archive import CONFIG, WEIGHTS, open_weights, read_config, read_tokenizer_files
from fedsft_assets.model.archive.torch_reader import TensorInfo, dtype_names, tensor_bytes
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import end_tokens
from fedsft_assets.model.huggingface.config import TOKENIZER_CONFIG, tokenizer_config, write_config
from fedsft_assets.model.huggingface.weights import PublishedWeights
from fedsft_assets.model.progress import ByteProgress

_SHARD = 5_000_000_000  # bytes


@dataclass(frozen=True)
class HuggingFaceReport:
    """What was exported: `types` are dtypes, `files` the weights files, `bytes` the size of their tensors."""

    architecture: str
    parameters: int
    types: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int


def export_huggingface(archive: Path, into: Path, shard: int = _SHARD) -> HuggingFaceReport:
    """Write the model, its tokenizer and its generation settings as the new folder `into`, atomically.

    A weights file has up to `shard` bytes of tensors, or one larger tensor. Raises ModelError if `into` exists and is
    not an empty folder, or the archive cannot be read.
    """
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise ModelError(f"{into}: already exists; choose a new folder, or remove it first")
    config = read_config(archive)
    tokenizer_files = read_tokenizer_files(archive, config)
    hf = _configuration(config["hf"], f"{archive}: {CONFIG}")
    with open_weights(archive) as tensors:
        weights = PublishedWeights(config["hf"], tensors, f"{archive}: {WEIGHTS}")
        infos = weights.infos
        hf.dtype = _main_dtype(infos.values())
        plan = _plan_shards(infos, shard)
        with publish_folder(into) as fresh:
            for name, content in tokenizer_files.items():
                (fresh / name).write_bytes(tokenizer_config(content) if name == TOKENIZER_CONFIG else content)
            _generation_config(hf, fresh, f"{archive}: the tokenizer's files").save_pretrained(fresh)
            write_config(hf, fresh, f"{archive}: {CONFIG}")
            _write_weights(fresh, weights, plan)
    return HuggingFaceReport(
        architecture=hf.architectures[0],
        parameters=sum(prod(info.shape) for info in infos.values()),
        types=dtype_names(infos.values()),
        files=tuple(plan.filename_to_tensors),
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


def _main_dtype(infos: Iterable[TensorInfo]) -> torch.dtype:
    """The dtype of most values, which `from_pretrained` uses for all of them by default."""
    values: dict[torch.dtype, int] = {}
    for info in infos:
        if info.dtype.is_floating_point:
            values[info.dtype] = values.get(info.dtype, 0) + prod(info.shape)
    return max(values, key=values.__getitem__)


def _plan_shards(infos: Mapping[str, TensorInfo], shard: int) -> StateDictSplit:
    """The assignment of tensors to files."""
    return split_state_dict_into_shards_factory(
        dict(infos),
        get_storage_size=lambda info: info.nbytes,
        filename_pattern=constants.SAFETENSORS_WEIGHTS_FILE_PATTERN,
        max_shard_size=shard,
    )


def _write_weights(folder: Path, weights: PublishedWeights, plan: StateDictSplit) -> None:
    """Write the planned files byte for byte as `safetensors.torch.save_file` does, with one tensor in memory.

    That function needs all tensors of a file at once: for a file of 413 MB, the process peaked at 753 MiB
    instead of 378 to 435, with a baseline of 363.
    """
    offsets: dict[str, int] = {}
    for file_name, names in plan.filename_to_tensors.items():
        header, starts = _header({name: weights.infos[name] for name in names})
        (folder / file_name).write_bytes(header)
        offsets |= starts
    progress = ByteProgress(plan.metadata["total_size"], "written")
    for name, tensor in weights.each():
        with (folder / plan.tensor_to_filename[name]).open("r+b") as file:
            file.seek(offsets[name])
            file.write(tensor_bytes(tensor))
        progress.add(tensor.nbytes)
        del tensor
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / constants.SAFETENSORS_INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file, and the byte offset in the file of each tensor; the widest dtypes come first.

    Format: https://github.com/huggingface/safetensors#format
    """
    from transformers.modeling_utils import str_to_torch_dtype

    dtypes = {dtype: name for name, dtype in str_to_torch_dtype.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for name, info in sorted(infos.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        starts[name], end = end, end + info.nbytes
        header[name] = {"dtype": dtypes[info.dtype], "shape": info.shape, "data_offsets": [starts[name], end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, {name: 8 + len(text) + start for name, start in starts.items()}


def _generation_config(hf: Any, tokenizer_folder: Path, where: str) -> Any:
    """Generation settings: every EOS ends an answer, and padding rows of the token table are never chosen."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelError(f"{where} cannot be read: {error}") from error
    ends = end_tokens(tokenizer.eos_token_id, hf.eos_token_id)
    padding = range(max(tokenizer.get_vocab().values()) + 1, hf.get_text_config().vocab_size)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        suppress_tokens=list(padding) or None,
    )
