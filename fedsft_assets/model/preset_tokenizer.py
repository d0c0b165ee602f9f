"""The tokenizer of a model preset, without loading its model, for measuring token lengths."""

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
    """The tokenizer of the preset's base model. Tokenizers that are slow to load are cached in the folder `cache`.

    A published archive is downloaded into `downloads`. Raises ModelError, and HubError if a download fails.
    """
    if preset.name == "tiny" and not preset.folder and not preset.archive:
        return tiny_tokenizer(sample_texts())
    # Not a folder's own tokenizer.json: transformers, and so the base model, may turn it into a different one.
    cached = cache / _identity(preset) / "tokenizer.json"
    if not cached.is_file():
        from fedsft_assets.model.base_model import load_tokenizer

        tokenizer = load_tokenizer(preset, downloads)
        with publish_file(cached) as path:
            tokenizer.backend_tokenizer.save(str(path))
    return Tokenizer.from_file(str(cached))


def _identity(preset: ModelPreset) -> str:
    """A cache key: the preset's name, and for the user's folder or archive a digest of its files' paths and stats."""
    if preset.folder:
        paths = [path for path in sorted(preset.folder.iterdir()) if path.suffix not in _WEIGHTS]
    elif preset.archive:
        paths = [preset.archive / CONFIG if preset.archive.is_dir() else preset.archive]
    else:
        return preset.name
    stats = [(str(path), path.stat()) for path in paths]
    parts = [version("transformers"), *(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}" for path, stat in stats)]
    return f"{preset.name}-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}"
