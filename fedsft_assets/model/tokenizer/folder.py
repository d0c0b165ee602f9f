"""The tokenizer of a Hugging Face folder, as transformers reads it: what the model's own tokenizer is.

No code of the folder is run. What could not be read, or would be read as another tokenizer, is refused by name.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import end_tokens

_COMPARED = 200  # words


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer: its own, a SentencePiece model, or a vocabulary and merges."""
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "*.model", "vocab.*", "*.tiktoken"))


def read_tokenizer_folder(folder: Path, gguf_file: str | None = None) -> Any:
    """The folder's tokenizer in its fast form; its padding token is EOS if it has none of its own.

    What ends the model's answers is a special token, as EOS is. Raises ModelError that names the folder or file.
    """
    from transformers import AutoTokenizer

    pieces = None if gguf_file or (folder / "tokenizer.json").is_file() else _sentencepiece(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file=gguf_file, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelError(f"{folder}: the tokenizer cannot be read: {error}") from error
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(
            f"{folder}: its tokenizer, a {type(tokenizer).__name__}, has no fast form, and training needs one; save it"
            " there as a tokenizer.json"
        )
    if pieces:
        _require_same_pieces(tokenizer, *pieces)
    _make_special(tokenizer, _ends(folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _sentencepiece(folder: Path) -> tuple[Path, Any] | None:
    """The folder's SentencePiece model, if it has one. Raises ModelError if a package that reads it is missing."""
    files = sorted(folder.glob("*.model"))
    if not files:
        return None
    remedy = "or save the tokenizer there as a tokenizer.json, which needs no other package"
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ModelError(
            f"{files[0]}: to read it, the package sentencepiece is missing ({error}); pip install"
            f" 'fedsft-assets[study]', {remedy}"
        ) from error
    processor = SentencePieceProcessor()
    try:
        processor.Load(str(files[0]))
    except (RuntimeError, OSError):
        return None  # a tiktoken file may have this name too
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401 transformers reads the file with it
    except Exception as error:  # of protobuf: its classes are made for another version
        raise ModelError(
            f"{files[0]}: the package sentencepiece {version('sentencepiece')} does not work beside protobuf"
            f" {version('protobuf')} ({error}); pip install 'sentencepiece<0.2.3', {remedy}"
        ) from error
    return files[0], processor


def _require_same_pieces(tokenizer: Any, file: Path, processor: Any) -> None:
    """Raises ModelError if transformers made another tokenizer of a SentencePiece file than what it says.

    Words are compared after another one: at the beginning of a text, not all that transformers makes has a "▁".
    """
    words = [piece[1:] for piece in map(processor.IdToPiece, range(len(processor))) if piece[1:].isalpha()]
    for word in [word for word in words if processor.PieceToId(f"▁{word}") != processor.unk_id()][:_COMPARED]:
        own = processor.encode(f"{word} {word}", out_type=str)[len(processor.encode(word)) :]
        ids = tokenizer(f"{word} {word}", add_special_tokens=False)["input_ids"]
        found = tokenizer.convert_ids_to_tokens(ids)[-len(own) :]
        if own != found:
            raise ModelError(
                f"{file}: transformers makes {' '.join(found)} of the word {word!r}, with a {type(tokenizer).__name__}"
                f" of {len(tokenizer)} tokens, where the file itself makes {' '.join(own)}; save the tokenizer there as"
                " a tokenizer.json"
            )


def _ends(folder: Path) -> list[int]:
    """What the model's configuration and its settings for generation call EOS."""
    named = []
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            try:
                said = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{file}: is not JSON: {error}; download it again") from error
            named.append(said.get("eos_token_id") if isinstance(said, dict) else None)
    return end_tokens(*named)


def _make_special(tokenizer: Any, ends: list[int]) -> None:
    """Of these tokens, make those special that a text becomes which spells them out."""
    added = tokenizer.added_tokens_decoder
    for token in [added[end] for end in ends if end in added and not added[end].special]:
        token.special = True
        tokenizer.add_tokens([token], special_tokens=True)
