"""What the sites of a round say of the same thing, compared: whoever is alone with it is named.

Each function returns, by site, why its result cannot be used. Where no majority agrees, nobody knows who is right: then
it raises ValueError that names all.
"""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping

from fedsft_assets.federation.protocol.site_messages import PointMessage
from fedsft_assets.specs.job import Precision

# Of a loss, relative to it: how far sites may differ that compute in another order, on another device, or in 16 bits.
_SAID_TOLERANCE: Mapping[Precision, float] = {"32": 1e-4, "bf16-mixed": 1e-2, "16-mixed": 1e-2}
# With `auto`, each site computes in what is faster there: any of them may be the loosest.
_TOLERANCE: Mapping[Precision, float] = {**_SAID_TOLERANCE, "auto": max(_SAID_TOLERANCE.values())}
_SMALL_LOSS = 0.05  # below it the difference counts, not its ratio

_NO_MAJORITY = 2  # sites, of which one is as likely to be right as the other

_ONE_MODEL = "all sites need the same base model and the same version of this package"


def differing_starts(starts: Mapping[str, Hashable]) -> dict[str, str]:
    """Of sites that began with a model of their own: those whose model was another than most sites'."""
    right = _of_most(starts)
    if right is None:
        raise ValueError(f"{', '.join(sorted(starts))} began with different base models or adapters; {_ONE_MODEL}")
    return {site: other_start(_others(starts, right)) for site, start in starts.items() if start != right}


def other_start(others: str) -> str:
    """What is wrong with a site that began with another model than these."""
    return f"began with another base model or other adapters than {others}; {_ONE_MODEL}"


def differing_scores(scores: Mapping[str, PointMessage], precision: Precision) -> dict[str, str]:
    """Of sites that scored the same model on the same records: those with another loss, or over other tokens."""
    tokens = _of_most({site: point.tokens for site, point in scores.items()})
    loss = statistics.median(point.value for point in scores.values())
    within = _TOLERANCE[precision] * max(loss, _SMALL_LOSS)
    agree = {site: point.tokens == tokens and abs(point.value - loss) <= within for site, point in scores.items()}
    if all(agree.values()):
        return {}
    if 2 * sum(agree.values()) <= len(agree):
        said = ", ".join(f"{site} {scores[site].measured}" for site in sorted(scores))
        raise ValueError(f"sites scored the same model on the same records and do not agree: {said}")
    right = next(scores[site] for site in sorted(scores) if agree[site])
    return {
        site: f"val_loss: found {scores[site].measured}, where most sites have {right.measured}"
        for site in sorted(scores)
        if not agree[site]
    }


def outsized_updates(norms: Mapping[str, float], steps: Mapping[str, int], limit: float) -> dict[str, str]:
    """Those whose update is more than `limit` times as large as the median of the other sites'.

    Who has taken more steps may have gone further, in proportion.
    """
    found = {}
    for site, norm in norms.items() if len(norms) > 1 else ():
        others = sorted(norms.keys() - {site})
        median = statistics.median(norms[other] for other in others)
        more_steps = max(1.0, steps[site] / statistics.median(steps[other] for other in others))
        if norm > limit * more_steps * median:
            ratio = norm / median if median else math.inf
            found[site] = (
                f"its update has {ratio:,.3g} times the norm of the other sites' (max_update_ratio is {limit:g}"
                f"{f', times {more_steps:.3g} for its steps' if more_steps > 1 else ''})"
            )
    if found and len(norms) == _NO_MAJORITY:
        raise ValueError("; ".join(f"{site}: {why}" for site, why in found.items()))
    return found


def _of_most(said: Mapping[str, Hashable]) -> Hashable | None:
    """What more than half of the sites say."""
    ((most, count),) = Counter(said.values()).most_common(1)
    return most if 2 * count > len(said) else None


def _others(said: Mapping[str, Hashable], right: Hashable) -> str:
    return ", ".join(sorted(site for site in said if said[site] == right))
