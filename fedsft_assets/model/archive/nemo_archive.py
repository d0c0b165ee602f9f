"""Reads and writes `.nemo` archives, without NeMo and without trust in who made them.

An archive is a tar of `model_config.yaml`, `model_weights.ckpt` and the tokenizer's files. Nothing is
extracted, imported or unpickled but descriptions of tensors, and weights go through memory one by one.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml

from fedsft_assets.files import publish_file
from fedsft_assets.model.archive.file_window import FileWindow
from fedsft_assets.model.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from fedsft_assets.model.archive.torch_reader import TensorFile, TensorInfo

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"
FIELDS = ("hf", "tokenizer", "max_length", "prompt_template")

# What NeMo's restore_from looks for: the class that it makes of an archive, and a version; nothing here does.
_TARGET = "fedsft_assets.model.nemo_model.SFTModel"
_NEMO_VERSION = "3.0.0"
LARGEST_CONFIG = 1 << 20
_DEEPEST_CONFIG = 50
LARGEST_TOKENIZER_FILE = 256 << 20
_MOST_MEMBERS = 64
_VALUES_AT_ONCE = 4 << 20
# What says how to load or run a model (from where, with which kernels, which may be downloaded code), not what it is.
_LOADING_OPTIONS = {
    *("attn_implementation", "auto_map", "dtype", "experts_implementation"),
    *("quantization_config", "torch_dtype", "transformers_version"),
}
# How transformers writes numbers that JSON does not have: {"__float__": "Infinity"}.
_NO_JSON_NUMBERS = ("Infinity", "-Infinity", "NaN")
_ARTIFACT = re.compile(r"nemo:[0-9a-f]{32}_(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)")


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an SFTModel archive: the fields named in FIELDS, nothing else, `hf` as by `describe`.

    Whatever else the file says (`target` above all, which names a class to import) is left out.
    Raises ModelError that names the file if it is missing, truncated, no plain tar of plain files,
    or not written by SFTModel.
    """
    with _opened(path) as (file, members):
        sizes = {name: member.size for name, member in members.items()}
        return parse_config(path, _text(path, file, members[CONFIG]), sizes)


def parse_config(path: Path, text: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """What `read_config` gives for an archive `path` with this configuration, and files of these names and sizes."""
    config = _parse(path, text)
    for key, value in config["tokenizer"]["files"].items():
        name = artifact_name(value) if isinstance(value, str) else None
        stored = str(value).removeprefix("nemo:")
        if name is None or stored not in sizes or key != artifact_key(name):
            raise ModelError(f"{path}: {CONFIG}: tokenizer.files.{key}: {value!r} is not a file of the archive")
        if sizes[stored] > LARGEST_TOKENIZER_FILE:
            raise ModelError(f"{path}: {stored} has {sizes[stored]} bytes, more than {LARGEST_TOKENIZER_FILE}")
    return config


def read_tokenizer_files(path: Path, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer's files, by their own names, of an archive whose configuration `read_config` has checked."""
    with _opened(path) as (file, members):
        return {
            str(artifact_name(value)): _content(path, file, members[value.removeprefix("nemo:")])
            for value in config["tokenizer"]["files"].values()
        }


@contextmanager
def open_weights(path: Path) -> Iterator[TensorFile]:
    """The archive's weights, to be read one by one. Raises ModelError that names the file."""
    from fedsft_assets.model.archive.torch_reader import TensorFile

    with _opened(path) as (file, members):
        part = _part(file, members[WEIGHTS])
        with TensorFile(part, f"{path}: {WEIGHTS}") as tensors:
            yield tensors


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
        "hf": describe(dict(config["hf"])),
        "tokenizer": {"files": files},
        "max_length": config["max_length"],
        "prompt_template": config["prompt_template"],
        "target": _TARGET,
        "nemo_version": _NEMO_VERSION,
    }
    text = yaml.safe_dump(content, sort_keys=False)
    _parse(path, text)
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


def describe(hf: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face configuration without what tells transformers where to load from and what code to run.

    Infinity and NaN, which JSON does not have and transformers writes as an object, become numbers again.
    """
    return {
        key: _described(value)
        for key, value in hf.items()
        if key not in _LOADING_OPTIONS and not str(key).startswith("_")
    }


def _described(value: Any) -> Any:
    if isinstance(value, list):
        return [_described(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in _NO_JSON_NUMBERS:
        return float(value["__float__"])
    return describe(value)


def artifact_key(name: str) -> str:
    """The configuration key for a file name: OmegaConf reads a dot in a key as a level."""
    return name.replace(".", "_")


def artifact_name(value: str) -> str | None:
    """The file's own name in `nemo:<32 hex digits>_<name>`, as NeMo names artifacts; None if it is not one."""
    match = _ARTIFACT.fullmatch(value)
    return match["name"] if match else None


def artifact_member(name: str, content: bytes) -> str:
    """The member's name for a file: NeMo's prefix is random, this one is the content's."""
    unique = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:32]
    if artifact_name(f"nemo:{unique}_{name}") is None or len(content) > LARGEST_TOKENIZER_FILE:
        raise ModelError(
            f"tokenizer file {name!r}: its name must be of letters, digits, '.', '_' and '-',"
            f" and it may have {LARGEST_TOKENIZER_FILE} bytes, found {len(content)}"
        )
    return f"{unique}_{name}"


@contextmanager
def new_tar(path: Path) -> Iterator[BinaryIO]:
    """A tar that becomes `path` when the block ends, whole or not at all; `tar_member` fills it."""
    with publish_file(path) as fresh, fresh.open("w+b") as file:
        yield file
        file.write(b"\0" * (2 * tarfile.BLOCKSIZE))


@contextmanager
def tar_member(file: BinaryIO, name: str) -> Iterator[None]:
    """What the block writes becomes a member of the tar; its header is written when its size is known."""
    start = file.tell()
    file.write(b"\0" * tarfile.BLOCKSIZE)
    yield
    end = file.tell()
    entry = tarfile.TarInfo(name)
    entry.size = end - start - tarfile.BLOCKSIZE
    file.seek(start)
    file.write(entry.tobuf(tarfile.GNU_FORMAT))
    file.seek(end)
    file.write(b"\0" * (-entry.size % tarfile.BLOCKSIZE))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, dict[str, tarfile.TarInfo]]]:
    """The open archive and where its members are. Raises ModelError that names the file."""
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected a .nemo archive")
    with path.open("rb") as file:
        size = path.stat().st_size
        try:
            with tarfile.open(fileobj=FileWindow(file, 0, size), mode="r:") as tar:
                members = _members(path, tar, size)
        except (tarfile.TarError, EOFError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{path}: is not an uncompressed tar archive, or is truncated: {error}") from error
        yield file, members


def _members(path: Path, tar: tarfile.TarFile, size: int) -> dict[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    for count, member in enumerate(tar):
        name = PurePosixPath(member.name)
        if count >= _MOST_MEMBERS:
            raise ModelError(f"{path}: more than {_MOST_MEMBERS} members")
        if member.isdir() and not name.parts:
            continue
        if not member.isreg() or member.issparse() or len(name.parts) != 1 or name.parts[0] in ("..", "/"):
            raise ModelError(f"{path}: member {member.name!r} is not a plain file at the top of the archive")
        if name.name in members:
            raise ModelError(f"{path}: member {member.name!r} is there twice")
        if member.offset_data + member.size > size:
            raise ModelError(f"{path}: truncated: {member.name!r} ends after the file does")
        members[name.name] = member
    missing = {CONFIG, WEIGHTS} - members.keys()
    if missing:
        raise ModelError(f"{path}: has no {' and no '.join(sorted(missing))}; not a .nemo archive, or truncated")
    return members


def _part(file: BinaryIO, member: tarfile.TarInfo) -> Any:
    return FileWindow(file, member.offset_data, member.size)


def _content(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> bytes:
    content = bytearray(member.size)
    if _part(file, member).readinto(content) != member.size:
        raise ModelError(f"{path}: truncated: {member.name!r} ends after the file does")
    return bytes(content)


def _text(path: Path, file: BinaryIO, member: tarfile.TarInfo) -> str:
    if member.size > LARGEST_CONFIG:
        raise ModelError(f"{path}: {CONFIG} has {member.size} bytes, more than {LARGEST_CONFIG}")
    try:
        return _content(path, file, member).decode()
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: {CONFIG} is not text: {error}") from error


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """The fields of a configuration that a stranger may have written. Raises ModelError that begins with `where`."""
    try:
        _require_plain(text, where)
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{where} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{where}: expected fields, found {type(content).__name__}")
    return content


def _require_plain(text: str, where: str) -> None:
    """Refuse what a small file can keep a parser busy with for hours; NeMo writes none of it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ModelError(f"{where} has YAML aliases")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_CONFIG:
            raise ModelError(f"{where} is nested more than {_DEEPEST_CONFIG} levels deep")


def _parse(path: Path, text: str) -> dict[str, Any]:
    content = load_yaml(text, f"{path}: {CONFIG}")
    missing = [field for field in FIELDS if field not in content]
    if missing:
        raise ModelError(
            f"{path}: not an SFTModel archive: {CONFIG} has no {', '.join(missing)}"
            f" (its target is {content.get('target')!r})"
        )
    config = {field: content[field] for field in FIELDS}
    try:
        json.dumps(config)
    except TypeError as error:  # YAML has dates and sets
        raise ModelError(f"{path}: {CONFIG} has a value that no model's configuration has: {error}") from error
    if "${" in yaml.safe_dump(config, width=float("inf")):
        # OmegaConf would resolve it, for example to the value of an environment variable.
        raise ModelError(f"{path}: {CONFIG} has an interpolation '${{'")
    hf, tokenizer = config["hf"], config["tokenizer"]
    if not isinstance(hf, dict) or not isinstance(hf.get("model_type"), str):
        raise ModelError(f"{path}: {CONFIG}: hf: expected a Hugging Face configuration with a model_type")
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("files"), dict) or not tokenizer["files"]:
        raise ModelError(f"{path}: {CONFIG}: tokenizer.files: expected the files of a tokenizer")
    if not isinstance(config["max_length"], int) or config["max_length"] < 2:
        raise ModelError(f"{path}: {CONFIG}: max_length: expected a number of tokens, found {config['max_length']!r}")
    return {**config, "hf": describe(hf)}
