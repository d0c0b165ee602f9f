"""The tokenizer of the preset `tiny`: a byte-level BPE of the embedded sample."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fedsft_assets.data.sources.sample import sample_examples
from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE, template

EOS = "<|endoftext|>"
_TINY_VOCABULARY = 1280


def sample_texts() -> list[str]:
    """The embedded sample of all datasets, each example as the text that a model will read."""
    style = template(DEFAULT_TEMPLATE)
    return [
        style.prompt("\n\n".join(part for part in (example.instruction, example.context) if part))
        + style.answer(example.response)
        for example in sample_examples()
    ]


def tiny_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of 1280 tokens, trained on these texts; EOS is the first token."""
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
