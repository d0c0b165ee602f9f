"""Reads and writes `.nemo` archives, without NeMo and without trust in who made them.

An archive is a tar of `model_config.yaml`, `model_weights.ckpt` and the tokenizer's files. Nothing is
extracted, imported or unpickled but descriptions of tensors, and weights go through memory one by one.
Functions of an `Archive` also read those that NeMo wrote; those of a path take this project's alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fedsft_assets.model.archive.archive_config import (
    FIELDS,
    MAX_CONFIG_BYTES,
    MAX_TOKENIZER_FILE_BYTES,
    artifact_key,
    artifact_member,
    artifact_name,
    load_yaml,
    normalize_hf_config,
    parse_config,
)
from fedsft_assets.model.archive.members import Archive, Limits, open_tar
from fedsft_assets.model.archive.tar_writer import new_tar, tar_member

if TYPE_CHECKING:
    from torch import Tensor

    from fedsft_assets.model.archive.torch_reader import TensorFile, TensorInfo

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"

# What NeMo's restore_from looks for: the class that it makes of an archive, and a version; nothing here does.
_TARGET = "fedsft_assets.model.nemo_model.SFTModel"
_NEMO_VERSION = "3.0.0"
# NeMo's restore_from extracts all members: they are files at the top.
_LIMITS = Limits(members=64, depth=1)
_VALUES_AT_ONCE = 4 << 20


def config_fields(archive: Archive) -> dict[str, Any]:
    """All that `model_config.yaml` says, as it says it; nothing that it names is imported. Raises ModelError."""
    return load_yaml(archive.text(CONFIG, MAX_CONFIG_BYTES), f"{archive.path}: {CONFIG}")


def config_of(archive: Archive) -> dict[str, Any]:
    """What `read_config` gives for an open archive of this project, whatever else is in it."""
    sizes = {name: member.size for name, member in archive.members.items()}
    return parse_config(config_fields(archive), f"{archive.path}: {CONFIG}", sizes)


def tokenizer_files_of(archive: Archive, config: Mapping[str, Any]) -> dict[str, bytes]:
    """What `read_tokenizer_files` gives for an open archive."""
    return {
        str(artifact_name(value)): archive.content(value.removeprefix("nemo:"), MAX_TOKENIZER_FILE_BYTES)
        for value in config["tokenizer"]["files"].values()
    }


def weights_of(archive: Archive) -> TensorFile:
    """The tensors of `model_weights.ckpt`, to be read one by one. Raises ModelError that names the archive."""
    from fedsft_assets.model.archive.torch_reader import TensorFile

    return TensorFile(archive.member(WEIGHTS).open(), f"{archive.path}: {WEIGHTS}")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an archive: the fields named in FIELDS, nothing else, `hf` by `normalize_hf_config`.

    Whatever else the file says (`target` above all, which names a class to import) is left out.
    Raises ModelError that names the file if it is missing, truncated, no uncompressed tar of plain files at its
    top, or not written by this project.
    """
    with _open_own(path) as archive:
        return config_of(archive)


def read_tokenizer_files(path: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files, by their own names, of an archive whose configuration `read_config` has checked."""
    with _open_own(path) as archive:
        return tokenizer_files_of(archive, config)


@contextmanager
def open_weights(path: Path) -> Iterator[TensorFile]:
    """The archive's weights, to be read one by one. Raises ModelError that names the file."""
    with _open_own(path) as archive, weights_of(archive) as tensors:
        yield tensors


@contextmanager
def _open_own(path: Path) -> Iterator[Archive]:
    with open_tar(path, _LIMITS) as archive:
        for name in (CONFIG, WEIGHTS):
            archive.member(name)
        yield archive


def write_archive(
    path: Path,
    config: Mapping[str, Any],
    tokenizer_files: Mapping[str, bytes],
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    shared: Mapping[str, str] | None = None,
) -> None:
    """Write an archive, whole or not at all; equal models give equal bytes.

    `config` has `hf`, `max_length` and `prompt_template`; tensors are as for `write_tensors`, which reads
    them one at a time. Raises ModelError for what `read_config` would not read.
    """
    from fedsft_assets.model.archive.torch_writer import write_tensors

    artifacts = {artifact_member(name, content): content for name, content in tokenizer_files.items()}
    files = {artifact_key(str(artifact_name(f"nemo:{artifact}"))): f"nemo:{artifact}" for artifact in artifacts}
    content = {
        "hf": normalize_hf_config(config["hf"]),
        "tokenizer": {"files": files},
        "max_length": config["max_length"],
        "prompt_template": config["prompt_template"],
        "target": _TARGET,
        "nemo_version": _NEMO_VERSION,
    }
    text, where = yaml.safe_dump(content, sort_keys=False), f"{path}: {CONFIG}"
    parse_config(load_yaml(text, where), where, {name: len(data) for name, data in artifacts.items()})
    with new_tar(path) as file:
        for name, data in {CONFIG: text.encode(), **artifacts}.items():
            with tar_member(file, name):
                file.write(data)
        with tar_member(file, WEIGHTS):
            write_tensors(file, tensors, read, shared)


def content_digest(path: Path) -> str:
    """SHA-256 in hex of configuration, tokenizer and fp32 weights: the same for equal models.

    The archive's bytes also depend on the type that weights are stored in, and on who wrote it.
    """
    import torch

    config = read_config(path)
    own = {field: config[field] for field in FIELDS if field != "tokenizer"}
    digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode())
    for name, content in sorted(read_tokenizer_files(path, config).items()):
        digest.update(f"\0{name}\0{hashlib.sha256(content).hexdigest()}".encode())
    with open_weights(path) as weights:
        for name, info in sorted(weights.tensors.items()):
            if name in weights.shared:
                continue
            dtype = torch.float32 if info.dtype.is_floating_point else info.dtype
            digest.update(f"\0{name}\0{dtype}\0{info.shape}\0".encode())
            for values in weights.read(name).flatten().split(_VALUES_AT_ONCE):
                digest.update(values.to(dtype).view(torch.uint8).numpy().data)
    return digest.hexdigest()
