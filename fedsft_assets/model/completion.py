"""Texts continued by a model: batched, padded on the left, until EOS."""

from typing import Any

import torch
from transformers import GenerationConfig

from fedsft_assets.model.batches import encode, prompt_prefix


@torch.no_grad()
def complete(
    lm: Any, tokenizer: Any, texts: list[str], *, max_new_tokens: int, temperature: float, batch_size: int
) -> list[str]:
    """What the Hugging Face model `lm` appends to each text, without the text, EOS and outer blanks.

    Greedy at temperature 0, else sampled from the whole vocabulary. A text that leaves no room for
    `max_new_tokens` within the model's positions loses its beginning.
    """
    bos, pad = prompt_prefix(tokenizer), tokenizer.pad_token_id
    prompts = encode(tokenizer, texts) if texts else []
    positions = getattr(lm.config, "max_position_embeddings", None)
    if positions:
        max_new_tokens = min(max_new_tokens, positions - len(bos) - 1)
        prompts = [ids[-(positions - len(bos) - max_new_tokens) :] for ids in prompts]
    prompts = [bos + ids for ids in prompts]
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id, pad_token_id=pad, **sampling
    )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    completions = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(prompts[chosen[-1]])
        gaps = [width - len(prompts[index]) for index in chosen]
        ids = [[pad] * gap + prompts[index] for gap, index in zip(gaps, chosen, strict=True)]
        mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
        output = lm.generate(
            input_ids=torch.tensor(ids, device=lm.device),
            attention_mask=torch.tensor(mask, device=lm.device),
            generation_config=settings,
        )
        for index, row in zip(chosen, output[:, width:], strict=True):
            completions[index] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return completions
