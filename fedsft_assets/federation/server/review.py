"""Validates site messages on arrival: against the job's limits, earlier messages, and other sites' results."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel

from fedsft_assets.federation.protocol.messages import Kind
from fedsft_assets.federation.protocol.points import VAL_LOSS
from fedsft_assets.federation.protocol.site_messages import (
    PointMessage,
    ReportMessage,
    RoundLimits,
    ScoreMessage,
    round_of,
)
from fedsft_assets.federation.server.cross_checks import (
    differing_scores,
    differing_starts,
    other_start,
    outsized_updates,
)
from fedsft_assets.federation.server.global_model import GlobalModel
from fedsft_assets.federation.server.site_update import SiteUpdate
from fedsft_assets.federation.server.state import ServerState


class Review:
    """Reviews the messages of one round at a time.

    `all_needed`: every site is required, so the first conflict ends the round without waiting for a majority. Sites
    whose update norm exceeds `max_update_ratio` times that of the others are rejected.
    """

    def __init__(
        self,
        limits: RoundLimits,
        state: ServerState,
        model: GlobalModel,
        all_needed: bool,
        max_update_ratio: float | None,
        say: Callable[[str], object],
    ) -> None:
        self._limits, self._state, self._model = limits, state, model
        self._all_needed, self._max_update_ratio, self._say = all_needed, max_update_ratio, say
        self.begin(0)

    def begin(self, number: int) -> None:
        """Start a round (0-based)."""
        self._number = number
        self._reports: set[tuple[str, str]] = set()  # (site, message id)
        self._points: defaultdict[str, dict[tuple[object, ...], PointMessage]] = defaultdict(dict)  # by site
        self._starts: dict[str, Hashable] = {}  # initial models of sites that make their own

    # Each raises ValueError for an invalid message.

    def report(self, site: str, payload: Any) -> ReportMessage | None:
        """A progress report; None if it is a duplicate."""
        message = self._limits.report(payload, self._number)
        if (site, message.id) in self._reports:
            return None
        known = self._points[site]
        for point in message.points:
            before = known.setdefault((point.name, point.round, point.step), point)
            if before.model_copy(update={"time": point.time}) != point:
                raise ValueError(
                    f"{point.name}: found {point.measured}, but the site reported {before.measured} before"
                )
        self._reports.add((site, message.id))
        return message

    def score(self, site: str, _result: FLModel) -> ScoreMessage:
        """A site's score of the model it was sent."""
        return self._limits.score(self._points_of_round(site), self._number, self.records(site))

    def update(self, site: str, result: FLModel) -> SiteUpdate:
        """A site's update of the model it was sent."""
        points = self._points_of_round(site)
        message = self._limits.update(result.meta, points, self._number, self.records(site))
        expected = Kind.CHANGE if self._model.weights else Kind.FULL
        if message.kind != expected:
            raise ValueError(
                f"kind: found {message.kind!r}, expected {str(expected)!r}; all sites need the same version"
            )
        update = SiteUpdate(message, result.params, self._model.shapes, self._model.wire, self._model.uses_directions)
        if self._state.progress.finished and message.first != self._state.progress.first:
            raise ValueError(other_start("earlier sites"))
        others = [other for other, start in self._starts.items() if start != update.start]
        if others and self._all_needed:  # otherwise the majority decides once all have answered
            raise ValueError(other_start(", ".join(others)))
        if not self._model.weights:
            self._starts[site] = update.start
        return update

    # Each returns sites that disagree with the majority, with the reason; raises ValueError if there is no majority.

    def odd_scores(self, scores: Mapping[str, ScoreMessage]) -> dict[str, str]:
        losses = {site: score.named(VAL_LOSS)[0] for site, score in scores.items()}
        return differing_scores(losses, self._limits.precision)

    def odd_updates(self, updates: Mapping[str, SiteUpdate]) -> dict[str, str]:
        starts = {site: update.start for site, update in updates.items()}
        odd = {} if self._model.weights else differing_starts(starts)
        left = {site: update for site, update in updates.items() if site not in odd}
        odd |= self.odd_scores({site: update.message for site, update in left.items()})
        if not self._max_update_ratio:
            return odd
        left = {site: update for site, update in left.items() if site not in odd}
        steps = {site: self._limits.work.steps(update.message.records) for site, update in left.items()}
        norms = {site: update.norm for site, update in left.items()}
        odd |= outsized_updates(norms, steps, self._max_update_ratio)
        directions = {site: update.norm_of_directions for site, update in left.items()}
        return outsized_updates(directions, steps, self._max_update_ratio) | odd

    def records(self, site: str) -> int | None:
        """Number of training records of the site: from the job, or as the site first reported it."""
        return self._limits.records.get(site) or self._state.progress.records.get(site)

    def note_records(self, site: str, records: int) -> None:
        """Remember the first record count that a site with private data reports; later ones must match."""
        if self.records(site) is None:
            self._state.progress.records[site] = records
            self._say(f"{site} · reports {records:,} training records of its own")

    def _points_of_round(self, site: str) -> list[PointMessage]:
        """Points that the site has reported in the current round, in order."""
        return [point for point in self._points[site].values() if point.round == round_of(point.name, self._number)]
