"""An archive of ours, or the folder of its files, that the user brings: taken over as it is."""

from pathlib import Path
from typing import Any

from fedsft_assets.model.archive.nemo_archive import (
    CONFIG,
    LARGEST_CONFIG,
    LARGEST_TOKENIZER_FILE,
    WEIGHTS,
    artifact_name,
    new_tar,
    parse_config,
    tar_member,
)
from fedsft_assets.model.archive.source import MegatronSource
from fedsft_assets.model.archive.torch_reader import TensorFile
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.trainable import require_finite_values

_BLOCK = 1 << 20


def own_tokenizer_files(source: MegatronSource) -> dict[str, bytes]:
    """The tokenizer's files by their own names. Raises ModelError that names the archive."""
    return {
        str(artifact_name(f"nemo:{name}")): source.content(name, LARGEST_TOKENIZER_FILE) for name in _artifacts(source)
    }


def copy_archive(source: MegatronSource, into: Path) -> None:
    """Write the archive `into`, whole or not at all: configuration, tokenizer and weights, and nothing else.

    Raises ModelError if they are not all there, or the weights are no tensors of finite numbers.
    """
    names = [CONFIG, *_artifacts(source), WEIGHTS]
    if WEIGHTS not in source.members:
        raise ModelError(f"{source.path}: has no {WEIGHTS}; not a .nemo archive, or truncated")
    where = f"{source.path}: {WEIGHTS}"
    with source.members[WEIGHTS].open() as file, TensorFile(file, where) as weights:
        for name, info in weights.tensors.items():
            if info.dtype.is_floating_point and name not in weights.shared:
                require_finite_values(f"{where}: {name}", weights.read(name))
    with new_tar(into) as file:
        for name in names:
            with source.members[name].open() as member, tar_member(file, name):
                while block := member.read(_BLOCK):
                    file.write(block)


def _artifacts(source: MegatronSource) -> list[str]:
    config: dict[str, Any] = parse_config(
        source.path,
        source.text(CONFIG, LARGEST_CONFIG),
        {name: member.size for name, member in source.members.items()},
    )
    return [value.removeprefix("nemo:") for value in config["tokenizer"]["files"].values()]
