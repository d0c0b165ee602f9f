"""Consistency checks between the sites of a round: sites that disagree with the majority are named.

Each function returns a dict from site to the reason to exclude its result. If no majority agrees, it raises ValueError
naming all sites.
"""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping

from fedsft_assets.federation.protocol.site_messages import PointMessage
from fedsft_assets.specs.job import Precision

# Relative difference in loss allowed between sites with other devices, summation order or 16-bit arithmetic.
_EXPLICIT_TOLERANCE: Mapping[Precision, float] = {"32": 1e-4, "bf16-mixed": 1e-2, "16-mixed": 1e-2}
# With `auto`, each site picks what is faster there, so the loosest tolerance applies.
_TOLERANCE: Mapping[Precision, float] = {**_EXPLICIT_TOLERANCE, "auto": max(_EXPLICIT_TOLERANCE.values())}
_SMALL_LOSS = 0.05  # below this, the tolerance is relative to this value

_NO_MAJORITY = 2  # with two sites, neither can outvote the other

_ONE_MODEL = "all sites need the same base model and the same fedsft-assets version"


def differing_starts(starts: Mapping[str, Hashable]) -> dict[str, str]:
    """Sites whose initial model differs from the majority's, where each site initialized its own."""
    right = _majority(starts)
    if right is None:
        raise ValueError(f"{', '.join(sorted(starts))} started from different base models or adapters; {_ONE_MODEL}")
    return {site: other_start(_sites_with(starts, right)) for site, start in starts.items() if start != right}


def other_start(others: str) -> str:
    """Error text for a site whose initial model differs from that of `others`."""
    return f"started from a base model or adapters that differ from those of {others}; {_ONE_MODEL}"


def differing_scores(scores: Mapping[str, PointMessage], precision: Precision) -> dict[str, str]:
    """Sites whose loss or token count differs from the majority's for the same model and records."""
    tokens = _majority({site: point.tokens for site, point in scores.items()})
    loss = statistics.median(point.value for point in scores.values())
    within = _TOLERANCE[precision] * max(loss, _SMALL_LOSS)
    agree = {site: point.tokens == tokens and abs(point.value - loss) <= within for site, point in scores.items()}
    if all(agree.values()):
        return {}
    if 2 * sum(agree.values()) <= len(agree):
        reported = ", ".join(f"{site} {scores[site].measured}" for site in sorted(scores))
        raise ValueError(f"sites disagree on the score of the same model on the same records: {reported}")
    right = next(scores[site] for site in sorted(scores) if agree[site])
    return {
        site: f"val_loss: found {scores[site].measured}, expected {right.measured}"
        for site in sorted(scores)
        if not agree[site]
    }


def outsized_updates(norms: Mapping[str, float], steps: Mapping[str, int], limit: float) -> dict[str, str]:
    """Sites whose update norm is more than `limit` times the median of the other sites'.

    The limit scales up for a site that took more optimizer steps than the others.
    """
    found = {}
    for site, norm in norms.items() if len(norms) > 1 else ():
        others = sorted(norms.keys() - {site})
        median = statistics.median(norms[other] for other in others)
        more_steps = max(1.0, steps[site] / statistics.median(steps[other] for other in others))
        if norm > limit * more_steps * median:
            ratio = norm / median if median else math.inf
            found[site] = (
                f"the norm of its update is {ratio:,.3g} times that of the other sites' (max_update_ratio is {limit:g}"
                f"{f', scaled by {more_steps:.3g} for its steps' if more_steps > 1 else ''})"
            )
    if found and len(norms) == _NO_MAJORITY:
        raise ValueError("; ".join(f"{site}: {why}" for site, why in found.items()))
    return found


def _majority(reported: Mapping[str, Hashable]) -> Hashable | None:
    """The value that more than half of the sites report, or None."""
    ((most, count),) = Counter(reported.values()).most_common(1)
    return most if 2 * count > len(reported) else None


def _sites_with(reported: Mapping[str, Hashable], right: Hashable) -> str:
    return ", ".join(sorted(site for site in reported if reported[site] == right))
