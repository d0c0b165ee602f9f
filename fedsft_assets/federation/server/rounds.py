"""The rounds of one execution at its server: site results are scored, journaled and averaged.

Independent of how messages are transported.
"""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedsft_assets.federation.protocol.costs import SERVER_CPU_SECONDS
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Finished, Journal, Progress, RoundDone
from fedsft_assets.federation.protocol.messages import BEST_MODEL, LAST_MODEL, Wire
from fedsft_assets.federation.protocol.meter import Meter
from fedsft_assets.federation.protocol.phases import round_to_ms
from fedsft_assets.federation.protocol.site_messages import RoundLimits, ScoreMessage, points_of
from fedsft_assets.federation.server.curves import merged_train_loss, merged_val_loss
from fedsft_assets.federation.server.global_model import GlobalModel
from fedsft_assets.federation.server.review import Review
from fedsft_assets.federation.server.site_update import SiteUpdate
from fedsft_assets.federation.server.state import ServerState


class Rounds:
    """State, journal, global model and review of an execution, resumed or created in `folder`.

    `sites` is the number of sites; `all_needed` means that every round requires all of them.
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
        """Raises ValueError if the state or the journal is unreadable, MeterError naming a file, and OSError."""
        self.state = ServerState(folder)
        self._meter = Meter(folder, "server")
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
        """Score the model sent in this round (0-based), then compute the next one and save it to disk."""
        messages = {site: update.message for site, update in updates.items()}
        self.score(messages)
        progress = self.state.progress
        points = {site: points_of(site, message.points) for site, message in messages.items()}
        trained = {site: message.samples for site, message in messages.items()}
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
        """Journal the score of the model that the sites were sent, and note whether it is the best so far."""
        progress = self.state.progress
        points = [point for site, score in scores.items() for point in points_of(site, score.points)]
        merged = merged_val_loss(points, progress.finished, sum(progress.samples.values()))
        cpu = round_to_ms(self._meter.read().cpu_seconds)
        self.journal.add([merged, replace(merged, name=SERVER_CPU_SECONDS, value=cpu)])
        if progress.finished > 0 and (progress.best_loss is None or merged.value < progress.best_loss):
            progress.best_loss, progress.best_round = merged.value, progress.finished

    def publish(self, run_dir: Path, complete: bool) -> None:
        """Put the files to be downloaded into the job's run folder: the journal and, if `complete`, the models."""
        progress = self.state.progress
        if complete:
            _link(self.state.model_file(progress.finished), run_dir / LAST_MODEL)
            _link(self.state.model_file(progress.best_round), run_dir / BEST_MODEL)
            self.journal.add([Finished()])
        _link(self.journal.path, run_dir / JOURNAL_FILE)
        if complete:
            self.state.hand_over_to(run_dir)


def _link(source: Path, target: Path) -> None:
    """Replace `target` with the current content of `source`: a hard link if possible, otherwise a copy."""
    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    try:
        os.link(source, fresh)
    except OSError:
        shutil.copyfile(source, fresh)
    os.replace(fresh, target)
