"""What leaves a private site of its evaluation: sums over prompts, enough for every interval, and no record's value.

It needs numpy alone, so that a site can make it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedsft_assets.evaluation.statistics.prompt_losses import Model, Numbers, PromptLosses, ScoresError

LEAST_PROMPTS = 20  # a sum of squares over fewer would say much about each


@dataclass(frozen=True)
class Moments:
    """Sums over the prompts of one place, or of several, for M models.

    `sums` [1 + M] are of answer tokens and of each model's losses, `products` [1 + M, 1 + M] of the squares and cross
    products of these by prompt: None where there are too few prompts to tell them.
    """

    models: tuple[Model, ...]
    records: int
    prompts: int
    sums: Numbers
    products: Numbers | None


@dataclass(frozen=True)
class Combined:
    """Several sites as one: all prompts are one sample, as where a study has their records itself.

    `everywhere` has the sums of all sites and no products. `measured` has both, of the sites that told products: what
    intervals are about; None if none did. `means_only` names the others.
    """

    everywhere: Moments
    measured: Moments | None
    means_only: tuple[str, ...]


def moments(scores: PromptLosses) -> Moments:
    """All that a site tells; with fewer than 20 prompts counts and sums alone."""
    columns = np.concatenate([scores.tokens[None], scores.losses])
    products = columns @ columns.T if scores.prompts >= LEAST_PROMPTS else None
    return Moments(scores.models, scores.records, scores.prompts, columns.sum(axis=1), products)


def combine(sites: Mapping[str, Moments]) -> Combined:
    """Add up what sites told. A prompt that two sites have is two prompts.

    Raises ScoresError if there is no site, or two scored different models.
    """
    if not sites:
        raise ScoresError("no site told its sums; at least one is needed")
    first = next(iter(sites))
    for site, told in sites.items():
        if told.models != sites[first].models:
            models = [", ".join(map(str, sites[name].models)) for name in (first, site)]
            raise ScoresError(f"{first} scored {models[0]}, {site} scored {models[1]}; score the same at every site")
    measured = [told for told in sites.values() if told.products is not None]
    products = [told.products for told in measured if told.products is not None]
    return Combined(
        everywhere=_total(list(sites.values()), None),
        measured=_total(measured, np.sum(products, axis=0)) if measured else None,
        means_only=tuple(site for site, told in sites.items() if told.products is None),
    )


def _total(told: list[Moments], products: Numbers | None) -> Moments:
    return Moments(
        told[0].models,
        sum(one.records for one in told),
        sum(one.prompts for one in told),
        np.sum([one.sums for one in told], axis=0),
        products,
    )
