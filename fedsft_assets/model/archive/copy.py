"""Copying of an archive of this project, or a folder of its files, that the user provides."""

import shutil
from pathlib import Path

from fedsft_assets.model.archive.members import Archive
from fedsft_assets.model.archive.nemo_archive import CONFIG, WEIGHTS, config_of, weights_of
from fedsft_assets.model.archive.tar_writer import new_tar, tar_member
from fedsft_assets.model.trainable import require_finite_values

_BLOCK = 1 << 20


def copy_archive(archive: Archive, into: Path) -> None:
    """Copy configuration, tokenizer and weights to the archive `into`, atomically, and nothing else.

    Raises ModelError if one of them is missing, or the weights are not tensors of finite numbers.
    """
    tokenizer = [value.removeprefix("nemo:") for value in config_of(archive)["tokenizer"]["files"].values()]
    with weights_of(archive) as weights:
        for name, info in weights.tensors.items():
            if info.dtype.is_floating_point and name not in weights.shared:
                require_finite_values(f"{archive.path}: {WEIGHTS}: {name}", weights.read(name))
    with new_tar(into) as file:
        for name in (CONFIG, *tokenizer, WEIGHTS):
            with archive.member(name).open() as member, tar_member(file, name):
                shutil.copyfileobj(member, file, _BLOCK)
