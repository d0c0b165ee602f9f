"""Locate and read the base model at the server. Requires torch only: the model itself is never built."""

import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch

from fedsft_assets.federation.protocol.messages import SITE_HOME, STUDY_HOME


def own_base_model(archive: Path, environment: Mapping[str, str]) -> Path:
    """Path of the archive on this server: the same file name under `FEDSFT_SITE_HOME` if set, otherwise the study's.

    Raises FileNotFoundError saying where to put it.
    """
    home = environment.get(SITE_HOME)
    path = Path(home) / "base_models" / archive.name if home else Path(environment.get(STUDY_HOME, "")) / archive
    if not path.is_file():
        raise FileNotFoundError(
            f"server: {path} is missing; copy the study's base model there, or set {SITE_HOME} at the server to the"
            " folder that contains base_models/"
        )
    return path


def read_nemo_weights(archive: Path) -> dict[str, torch.Tensor]:
    """The state dict of a `.nemo` archive in float32; a shared tensor appears once, under its first name.

    Unpickles tensors only. Raises FileNotFoundError, or ValueError if the archive has no weights.
    """
    with tarfile.open(archive) as tar:
        member = next((m for m in tar.getmembers() if Path(m.name).name == "model_weights.ckpt"), None)
        file = tar.extractfile(member) if member else None
        if file is None:
            raise ValueError(f"{archive}: model_weights.ckpt is missing; is it a .nemo archive?")
        state = torch.load(file, map_location="cpu", weights_only=True)
    unique: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if identity not in seen:
            seen.add(identity)
            unique[name] = tensor.to(torch.float32)
    return unique
