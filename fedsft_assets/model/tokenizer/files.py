"""Conversion between a Hugging Face tokenizer and the contents of its files by name, as stored in archives."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedsft_assets.model.errors import ModelError


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The contents of the files that `save_pretrained` writes for a tokenizer, by name."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def tokenizer_of(files: Mapping[str, bytes]) -> Any:
    """Load the tokenizer from its files, without running code in them; its padding token defaults to EOS.

    Raises ModelError if they cannot be read.
    """
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the tokenizers library raises bare Exception for a bad file
            raise ModelError(f"the archive's tokenizer files cannot be read: {error}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
