"""Job-level loss curves, merged from what the sites measured."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedsft_assets.federation.protocol.points import TRAIN_LOSS, VAL_LOSS, Point


def merged_val_loss(points: Sequence[Point], round: int, samples: int) -> Point:
    """Mean of the sites' `val_loss` for one model, weighted by validation tokens."""
    loss, _ = _mean([point for point in points if point.name == VAL_LOSS])
    return Point(VAL_LOSS, loss, round, samples)


def merged_train_loss(
    points: Mapping[str, Sequence[Point]], trained: Mapping[str, int], before: Mapping[str, int], round: int
) -> list[Point]:
    """Merge the sites' `train_loss` steps of one round into one curve over the samples of all sites.

    Both dicts are by site: `trained` counts the samples of this round, `before` those of all earlier rounds.
    """
    by_step: defaultdict[int, list[Point]] = defaultdict(list)
    seen = dict(before)
    for site, all_points in points.items():
        steps = [point for point in all_points if point.name == TRAIN_LOSS]
        # A site's own count includes rounds that it missed.
        ahead = steps[-1].samples - trained[site] - seen.get(site, 0) if steps else 0
        for point in steps:
            if point.step is not None:
                by_step[point.step].append(replace(point, samples=point.samples - ahead))
    merged = []
    for step, of_step in sorted(by_step.items()):
        seen.update({point.site: point.samples for point in of_step if point.site})
        loss, tokens = _mean(of_step)
        merged.append(Point(TRAIN_LOSS, loss, round, sum(seen.values()), step=step, tokens=tokens))
    return merged


def _mean(points: list[Point]) -> tuple[float, int]:
    """Token-weighted mean of the points' values, and the total number of tokens."""
    tokens = sum(point.tokens or 0 for point in points)
    return sum(point.value * (point.tokens or 0) for point in points) / tokens, tokens
