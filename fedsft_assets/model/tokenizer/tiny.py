"""The tokenizer of the preset `tiny`: a byte-level BPE trained on the embedded sample."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedsft_assets.data.sources.sample import sample_examples
from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE, template

EOS = "<|endoftext|>"
_TINY_VOCABULARY = 1280


def sample_texts() -> list[str]:
    """All examples of the embedded sample, formatted with the default prompt template."""
    style = template(DEFAULT_TEMPLATE)
    return [
        style.prompt("\n\n".join(part for part in (example.instruction, example.context) if part))
        + style.answer(example.response)
        for example in sample_examples()
    ]


def tiny_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE of 1280 tokens on these texts; EOS is the first token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_TINY_VOCABULARY,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe
