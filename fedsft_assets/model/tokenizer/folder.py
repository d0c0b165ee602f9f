"""Reader of the tokenizer of a Hugging Face folder, through transformers.

No code from the folder is run. Files that cannot be read, or would become a different tokenizer, are refused by name.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import end_tokens

_COMPARED = 200  # words


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder has tokenizer files: tokenizer*, a SentencePiece model, a vocabulary, or tiktoken ranks."""
    return any(any(folder.glob(pattern)) for pattern in ("tokenizer*", "*.model", "vocab.*", "*.tiktoken"))


def read_tokenizer_folder(folder: Path, gguf_file: str | None = None) -> Any:
    """The folder's fast tokenizer; its padding token defaults to EOS.

    All tokens that end the model's answers are made special. Raises ModelError that names the folder or file.
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
            f"{folder}: its tokenizer, a {type(tokenizer).__name__}, is not a fast tokenizer, which training needs;"
            " save it there as a tokenizer.json"
        )
    if pieces:
        _require_same_pieces(tokenizer, *pieces)
    _make_special(tokenizer, _ends(folder))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _sentencepiece(folder: Path) -> tuple[Path, Any] | None:
    """The folder's SentencePiece model, if any. Raises ModelError if a package for reading it is missing."""
    files = sorted(folder.glob("*.model"))
    if not files:
        return None
    remedy = "or save the tokenizer there as a tokenizer.json, which needs no other package"
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ModelError(
            f"{files[0]}: the package sentencepiece, needed to read it, is missing ({error}); pip install"
            f" 'fedsft-assets[study]', {remedy}"
        ) from error
    processor = SentencePieceProcessor()
    try:
        processor.Load(str(files[0]))
    except (RuntimeError, OSError):
        return None  # tiktoken files may have this name too
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401 transformers reads the file with it
    except Exception as error:  # raised by protobuf: the generated classes are for another version
        raise ModelError(
            f"{files[0]}: the package sentencepiece {version('sentencepiece')} does not work with protobuf"
            f" {version('protobuf')} ({error}); pip install 'sentencepiece<0.2.3', {remedy}"
        ) from error
    return files[0], processor


def _require_same_pieces(tokenizer: Any, file: Path, processor: Any) -> None:
    """Raise ModelError if transformers' tokenizer differs from the SentencePiece file that it was made from.

    Words are compared after another one, because not all transformers tokenizers put a "▁" at the beginning of a text.
    """
    words = [piece[1:] for piece in map(processor.IdToPiece, range(len(processor))) if piece[1:].isalpha()]
    for word in [word for word in words if processor.PieceToId(f"▁{word}") != processor.unk_id()][:_COMPARED]:
        expected = processor.encode(f"{word} {word}", out_type=str)[len(processor.encode(word)) :]
        ids = tokenizer(f"{word} {word}", add_special_tokens=False)["input_ids"]
        found = tokenizer.convert_ids_to_tokens(ids)[-len(expected) :]
        if expected != found:
            raise ModelError(
                f"{file}: transformers encodes the word {word!r} as {' '.join(found)}, with a"
                f" {type(tokenizer).__name__} of {len(tokenizer)} tokens, but the file itself as {' '.join(expected)};"
                " save the tokenizer there as a tokenizer.json"
            )


def _ends(folder: Path) -> list[int]:
    """The EOS ids in the model's configuration and generation settings."""
    named = []
    for file in (folder / "config.json", folder / "generation_config.json"):
        if file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ModelError(f"{file}: is not JSON: {error}; download it again") from error
            named.append(content.get("eos_token_id") if isinstance(content, dict) else None)
    return end_tokens(*named)


def _make_special(tokenizer: Any, ends: list[int]) -> None:
    """Make those of these tokens special that are added tokens, so that a text cannot spell them out."""
    added = tokenizer.added_tokens_decoder
    for token in [added[end] for end in ends if end in added and not added[end].special]:
        token.special = True
        tokenizer.add_tokens([token], special_tokens=True)
