"""The tokenizer of a model preset, without loading its model: what token lengths are measured with."""

import hashlib
from importlib.metadata import version
from pathlib import Path

from tokenizers import Tokenizer

from fedsft_assets.files import publish_file
from fedsft_assets.model.archive.nemo_archive import CONFIG
from fedsft_assets.model.tokenizer.tiny import sample_texts, tiny_tokenizer
from fedsft_assets.specs.model_preset import ModelPreset

_WEIGHTS = (".safetensors", ".bin", ".gguf")


def preset_tokenizer(preset: ModelPreset, cache: Path, downloads: Path | None = None) -> Tokenizer:
    """The tokenizer of the preset's base model. Those that are slow to load are kept in the folder `cache`.

    A published archive is downloaded into `downloads`. Raises ModelError, and HubError if that fails.
    """
    if preset.name == "tiny" and not preset.folder and not preset.archive:
        return tiny_tokenizer(sample_texts())
    # Not a folder's own tokenizer.json: what transformers makes of it, and the base model has, may be another one.
    kept = cache / _identity(preset) / "tokenizer.json"
    if not kept.is_file():
        from fedsft_assets.model.base_model import load_tokenizer

        tokenizer = load_tokenizer(preset, downloads)
        with publish_file(kept) as path:
            tokenizer.backend_tokenizer.save(str(path))
    return Tokenizer.from_file(str(kept))


def _identity(preset: ModelPreset) -> str:
    """Names the preset and, for a folder or archive of the user's, its content by place, size and time of its files."""
    if preset.folder:
        places = [path for path in sorted(preset.folder.iterdir()) if path.suffix not in _WEIGHTS]
    elif preset.archive:
        places = [preset.archive / CONFIG if preset.archive.is_dir() else preset.archive]
    else:
        return preset.name
    states = [(str(place), place.stat()) for place in places]
    told = [version("transformers"), *(f"{place}\0{state.st_size}\0{state.st_mtime_ns}" for place, state in states)]
    return f"{preset.name}-{hashlib.sha256(chr(0).join(told).encode()).hexdigest()[:16]}"
