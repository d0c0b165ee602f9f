"""Reader and writer of `.nemo` archives, without NeMo; archives may be untrusted.

An archive is a tar of `model_config.yaml`, `model_weights.ckpt` and the tokenizer's files. Nothing is
extracted or imported, only tensor descriptions are unpickled, and weights are processed one tensor at a time.
Functions that take an `Archive` also read NeMo's archives; those that take a path read only this project's.
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

# NeMo's restore_from looks for these: the class to instantiate, and a version. Nothing here reads them.
_TARGET = "fedsft_assets.model.nemo_model.SFTModel"
_NEMO_VERSION = "3.0.0"
# NeMo's restore_from extracts all members, so only top-level files are allowed.
_LIMITS = Limits(members=64, depth=1)
_VALUES_AT_ONCE = 4 << 20  # values converted to fp32 at a time


def config_fields(archive: Archive) -> dict[str, Any]:
    """All fields of `model_config.yaml`, unchanged; nothing that it names is imported. Raises ModelError."""
    return load_yaml(archive.text(CONFIG, MAX_CONFIG_BYTES), f"{archive.path}: {CONFIG}")


def config_of(archive: Archive) -> dict[str, Any]:
    """`read_config` for an open archive of this project, which may have other members."""
    sizes = {name: member.size for name, member in archive.members.items()}
    return parse_config(config_fields(archive), f"{archive.path}: {CONFIG}", sizes)


def tokenizer_files_of(archive: Archive, config: Mapping[str, Any]) -> dict[str, bytes]:
    """`read_tokenizer_files` for an open archive."""
    return {
        str(artifact_name(value)): archive.content(value.removeprefix("nemo:"), MAX_TOKENIZER_FILE_BYTES)
        for value in config["tokenizer"]["files"].values()
    }


def weights_of(archive: Archive) -> TensorFile:
    """The tensors of `model_weights.ckpt`, for reading one at a time. Raises ModelError that names the archive."""
    from fedsft_assets.model.archive.torch_reader import TensorFile

    return TensorFile(archive.member(WEIGHTS).open(), f"{archive.path}: {WEIGHTS}")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an archive: only FIELDS, with `hf` passed through `normalize_hf_config`.

    All other fields are dropped, in particular `target`, which names a class to import. Raises ModelError that
    names the file if it is missing, truncated, not an uncompressed tar of top-level plain files, or not written
    by this project.
    """
    with _open_own(path) as archive:
        return config_of(archive)


def read_tokenizer_files(path: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The contents of the tokenizer's files by name, of an archive with this validated configuration."""
    with _open_own(path) as archive:
        return tokenizer_files_of(archive, config)


@contextmanager
def open_weights(path: Path) -> Iterator[TensorFile]:
    """Open the archive's weights for reading one at a time. Raises ModelError that names the file."""
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
    """Write an archive, atomically; equal models give equal bytes.

    `config` has `hf`, `max_length` and `prompt_template`; `tensors`, `read` and `shared` are as in
    `write_tensors`. Raises ModelError if `read_config` would refuse the result.
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

    The archive's bytes also depend on the dtype of the stored weights, and on the program that wrote it.
    """
    import torch

    config = read_config(path)
    fields = {field: config[field] for field in FIELDS if field != "tokenizer"}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
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
