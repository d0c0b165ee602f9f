"""Loads a checkpoint that is registered in MLflow, and answers prompts as `fedsft-generate` does.

Each registered model has a copy of this file as `code/fedsft_model_loader.py`, which MLflow imports. Where fedsft is
not installed, what the model needs of it comes from the model itself.
"""

import importlib.util
import json
import logging
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ARCHIVE, REFERENCE, PACKAGE = "model.nemo", "archive.json", "fedsft_assets.zip"
MAX_NEW_TOKENS = 256  # the default of `fedsft-generate`
_OPTIONS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")

_log = logging.getLogger(__name__)


class AnsweringModel:
    """A checkpoint that answers prompts. Threads take turns."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock = threading.Lock()

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> list[str]:
        """An answer to each prompt in the only column of `data`, or in a list.

        `params` are the options of `fedsft-generate`, with underscores. Prompts are answered one by one, not in
        batches, whose padding could move an answer.
        """
        from fedsft_assets.model.generation_settings import GenerationSettings

        params = params or {}
        given = {name: params[name] for name in _OPTIONS if params.get(name) is not None}
        settings = GenerationSettings(**{"max_new_tokens": MAX_NEW_TOKENS, **given})
        chat = bool(params.get("chat", False))
        with self._lock:
            return [self._model.generate([prompt], settings, chat=chat)[0] for prompt in _prompts(data)]


def _load_pyfunc(path: str) -> AnsweringModel:
    """MLflow's entry point; `path` is the model's folder."""
    folder = Path(path)
    if importlib.util.find_spec("fedsft_assets") is None:
        sys.path.append(str(folder / PACKAGE))
    from fedsft_assets.model.language_model import LanguageModel

    return AnsweringModel(LanguageModel.load(_archive(folder)))


def _archive(folder: Path) -> Path:
    """The model's archive, or the one outside that it refers to, if that is still the same."""
    if (folder / ARCHIVE).is_file():
        return folder / ARCHIVE
    from fedsft_assets.model.archive.nemo_archive import content_digest

    reference = json.loads((folder / REFERENCE).read_text(encoding="utf-8"))
    archive = Path(reference["path"])
    if not archive.is_file():
        raise FileNotFoundError(
            f"{archive}: does not exist on this machine. The model refers to this archive and does not contain it, as"
            " it was larger than FEDSFT_LARGEST_UPLOAD; load the model where the archive is, or copy it to this path"
        )
    digest = content_digest(archive)
    if digest != reference["digest"]:
        raise ValueError(
            f"{archive}: is another archive than the registered one: its digest is {digest}, not {reference['digest']}"
        )
    return archive


def _prompts(data: Any) -> Iterable[str]:
    """The prompts of a list, of numpy's array [N] or [N, 1], or of a table with one column."""
    if hasattr(data, "columns"):
        if len(data.columns) != 1:
            raise ValueError(f"expected one column of prompts, found {', '.join(map(str, data.columns))}")
        data = data.iloc[:, 0]
    return [str(prompt) for prompt in (data.reshape(-1) if hasattr(data, "reshape") else data)]
