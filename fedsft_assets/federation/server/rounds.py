"""The rounds of one execution as its server keeps them: what sites sent is scored, written down, and averaged.

Nothing here knows how messages travel.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Finished, Journal, Progress, RoundDone
from fedsft_assets.federation.protocol.messages import BEST_MODEL, LAST_MODEL, Wire
from fedsft_assets.federation.protocol.site_messages import RoundLimits, ScoreMessage, points_of
from fedsft_assets.federation.server.curves import merged_train_loss, merged_val_loss
from fedsft_assets.federation.server.global_model import GlobalModel
from fedsft_assets.federation.server.review import Review
from fedsft_assets.federation.server.site_update import SiteUpdate
from fedsft_assets.federation.server.state import ServerState


class Rounds:
    """State, journal, global model and review of an execution, resumed or created in `folder`.

    `sites` is how many there are; `all_needed`, that no round can do without one of them.
    """

    def __init__(
        self,
        folder: Path,
        limits: RoundLimits,
        wire: Wire,
        algorithm: dict[str, Any],
        sites: int,
        all_needed: bool,
        max_update_ratio: float | None,
    ) -> None:
        """Raises ValueError for a state or a journal that cannot be read."""
        self.state = ServerState(folder)
        self.journal = Journal(folder / JOURNAL_FILE)
        self.global_model = GlobalModel(self.state, wire, algorithm, sites)
        self.review = Review(
            limits,
            self.state,
            self.global_model,
            all_needed,
            max_update_ratio,
            say=lambda text: self.journal.add([Progress(text)]),
        )

    def finish(self, number: int, updates: Mapping[str, SiteUpdate]) -> None:
        """Score the model that was sent in a round (0-based), and make the next one; it is on the disk afterwards."""
        said = {site: update.message for site, update in updates.items()}
        self.score(said)
        progress = self.state.progress
        points = {site: points_of(site, message.points) for site, message in said.items()}
        trained = {site: message.samples for site, message in said.items()}
        self.journal.add(merged_train_loss(points, trained, progress.samples, number + 1))
        for site, update in updates.items():
            progress.first = update.message.first
            self.review.note_records(site, update.message.records)
        self.global_model.move(updates)
        for site, samples in trained.items():
            progress.samples[site] = progress.samples.get(site, 0) + samples
        progress.finished = number + 1
        self.state.commit_round(self.global_model.kept())
        self.journal.add([RoundDone(number + 1)])

    def score(self, scores: Mapping[str, ScoreMessage]) -> None:
        """Write down how good the model is that the sites were given, and whether it is the best so far."""
        progress = self.state.progress
        points = [point for site, score in scores.items() for point in points_of(site, score.points)]
        whole = merged_val_loss(points, progress.finished, sum(progress.samples.values()))
        self.journal.add([whole])
        if progress.finished > 0 and (progress.best_loss is None or whole.value < progress.best_loss):
            progress.best_loss, progress.best_round = whole.value, progress.finished

    def publish(self, run_dir: Path, complete: bool) -> None:
        """Leave in the job's own folder what is to be fetched: the journal and, of a `complete` job, its models."""
        progress = self.state.progress
        if complete:
            _link(self.state.model_file(progress.finished), run_dir / LAST_MODEL)
            _link(self.state.model_file(progress.best_round), run_dir / BEST_MODEL)
            self.journal.add([Finished()])
        _link(self.journal.path, run_dir / JOURNAL_FILE)
        if complete:
            self.state.hand_over_to(run_dir)


def _link(source: Path, target: Path) -> None:
    """Make `target` the content that `source` has now, at no cost where both are on one disk."""
    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    try:
        os.link(source, fresh)
    except OSError:
        shutil.copyfile(source, fresh)
    os.replace(fresh, target)
