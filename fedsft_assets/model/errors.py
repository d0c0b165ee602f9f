"""The error raised for models, archives and tokenizers."""


class ModelError(ValueError):
    """An unusable model, archive, tokenizer or set of weights."""
