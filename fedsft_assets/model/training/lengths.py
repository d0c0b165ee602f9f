"""Token lengths of the records of all splits, before truncation."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE
from fedsft_assets.model.tokenizer.encode import front_tokens
from fedsft_assets.model.training.token_cache import tokenized
from fedsft_assets.store import SPLITS, split_file

Lengths = npt.NDArray[np.int32]


def token_lengths(folder: Path, tokenizer: Tokenizer) -> Lengths:
    """The number of tokens of each record, int32 [N], in the order of training, validation and testing.

    Counts all that a trainer sees before truncation: template, input, output, and the tokens that begin and end a
    record. The tokens are cached beside the splits, for trainers.
    """
    added = len(front_tokens(tokenizer)) + 1
    description = tokenizer.to_str().encode()
    splits = [tokenized(split_file(folder, split), description, DEFAULT_TEMPLATE) for split in SPLITS]
    return np.concatenate([np.diff(tokens.starts) + added for tokens in splits]).astype(np.int32)
