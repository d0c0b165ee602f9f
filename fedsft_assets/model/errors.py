"""The error that everything about models, archives and tokenizers raises."""


class ModelError(ValueError):
    """A model, archive, tokenizer or set of weights that cannot be used."""
