"""What a site says in a round: checked as it arrives, against the job's limits, its own words, and the other sites'."""

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
    """The review of one round after another.

    `all_needed`: a round needs all sites, so who is right need not be found out by waiting for the others. Sites whose
    changes have more than `max_update_ratio` times the others' norm are odd ones.
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
        """The round (0-based) that is under way from now on."""
        self._number = number
        self._reports: set[tuple[str, str]] = set()  # sites and ids of their messages
        self._points: defaultdict[str, dict[tuple[object, ...], PointMessage]] = defaultdict(dict)  # by site
        self._starts: dict[str, Hashable] = {}  # of sites in it that begin with a model of their own

    # Each raises ValueError for what cannot be used.

    def report(self, site: str, payload: Any) -> ReportMessage | None:
        """What a site reports while it works; None if it is the same message once more."""
        message = self._limits.report(payload, self._number)
        if (site, message.id) in self._reports:
            return None
        known = self._points[site]
        for point in message.points:
            before = known.setdefault((point.name, point.round, point.step), point)
            if before.model_copy(update={"time": point.time}) != point:
                raise ValueError(
                    f"{point.name}: found {point.measured}, which the site had said to be {before.measured}"
                )
        self._reports.add((site, message.id))
        return message

    def score(self, site: str, _result: FLModel) -> ScoreMessage:
        """What a site has measured of the model that it was given."""
        return self._limits.score(self._points_of_round(site), self._number, self.records(site))

    def update(self, site: str, result: FLModel) -> SiteUpdate:
        """What a site has made of it."""
        points = self._points_of_round(site)
        message = self._limits.update(result.meta, points, self._number, self.records(site))
        expected = Kind.CHANGE if self._model.weights else Kind.FULL
        if message.kind != expected:
            raise ValueError(f"sent {message.kind!r} where {str(expected)!r} was to come; are the versions the same?")
        update = SiteUpdate(message, result.params, self._model.shapes, self._model.wire, self._model.uses_directions)
        if self._state.progress.finished and message.first != self._state.progress.first:
            raise ValueError(other_start("the sites before"))
        others = [other for other, start in self._starts.items() if start != update.start]
        if others and self._all_needed:  # else it is seen who is right when all have answered
            raise ValueError(other_start(", ".join(others)))
        if not self._model.weights:
            self._starts[site] = update.start
        return update

    # Each returns sites whose word is not that of the others, and why; raises ValueError where nobody can say who is
    # right.

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
        """That the site trains on: as the job says, or as the site itself said first."""
        return self._limits.records.get(site) or self._state.progress.records.get(site)

    def note_records(self, site: str, records: int) -> None:
        """Hold a site with data of its own to how many records it says first."""
        if self.records(site) is None:
            self._state.progress.records[site] = records
            self._say(f"{site} · says that it trains on {records:,} records of its own")

    def _points_of_round(self, site: str) -> list[PointMessage]:
        """What the site has reported of the round that is under way, in its order."""
        return [point for point in self._points[site].values() if point.round == round_of(point.name, self._number)]
