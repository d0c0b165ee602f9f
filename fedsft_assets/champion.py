"""Has the evaluations of a study decide who is champion, and MLflow's registry say so."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

from fedsft_assets.data.records import DataError
from fedsft_assets.data.split_report import version_with
from fedsft_assets.evaluation.champion import CHAMPION, Decision, decide, without_champion
from fedsft_assets.evaluation.record_scores import LOSSES_FILE, Evaluation, evaluate, read_losses
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.model.errors import ModelError
from fedsft_assets.specs.job import BASE_MODEL, TrainingSpec
from fedsft_assets.specs.model_preset import ModelPreset
from fedsft_assets.specs.plan import ResolvedTraining
from fedsft_assets.store import Store
from fedsft_assets.tracking import Outbox, Tracking, registered_model
from fedsft_assets.tracking.promotion import Champion, Promotion, Promotions, within
from fedsft_assets.versions import adding, versions_of

_log = logging.getLogger(__name__)


def move_champion(evaluations: Sequence[Path], store: Store, preset: ModelPreset, tracking: Tracking) -> Decision:
    """Decide by the evaluations of all jobs and the base model, and deliver it to MLflow, now or later.

    The evaluations are on one testing split. A champion that is none of the jobs' checkpoints is scored on it again.
    MLflow is waited for at most `tracking.patience` seconds. Raises ScoresError.
    """
    deadline = time.monotonic() + tracking.patience
    evaluated = [Evaluation.read(folder) for folder in evaluations]
    digests = {one.model: one.archive_digest for one in evaluated}
    split = evaluated[0].testing_split
    model = registered_model(preset.name)
    promotions = Promotions(store.outbox)
    champion = promotions.champion(tracking, model)
    over = champion.digest if champion else None
    if champion is None or champion.digest in {digest for name, digest in digests.items() if name != BASE_MODEL}:
        decision = decide(read_losses(evaluations), digests, over)
    else:
        try:
            again = _scored(champion, store, split, preset.resolve(TrainingSpec()))
        except (ModelError, DataError, OSError) as error:
            _log.warning("%s: the champion, version %s, cannot be scored: %s", model, champion.version, error)
            why = f"version {champion.version}, which cannot be scored ({error})"
            decision = without_champion(decide(read_losses(evaluations), digests, None), champion.digest, why)
        else:
            losses = read_losses([*evaluations, again])
            decision = decide(losses, {**digests, CHAMPION: champion.digest}, champion.digest)
    promotions.put(Promotion(model, split, over, decision.champion, decision.challenger, decision.reasons))
    left = within(deadline - time.monotonic(), lambda: Outbox(store.outbox).deliver_promotions(tracking))
    for one in promotions.pending():
        reason = next((each.reason for each in left or [] if each.folder == one), "no answer in time")
        _log.warning(
            "%s: champion and challenger are moved later (%s): the decision is kept in %s and delivered by"
            " `fedsft track` or with the next job",
            *(one.stem, reason, one),
        )
    return decision


def _scored(champion: Champion, store: Store, split: str, training: ResolvedTraining) -> Path:
    """The champion's evaluation on this testing split: scored now, unless it was before."""
    from fedsft_assets.model.language_model import LanguageModel

    versions = store.evaluation(CHAMPION)
    wanted = Evaluation(CHAMPION, champion.digest, split, training.max_length)
    for version in versions_of(versions):
        if Evaluation.read(version) == wanted:
            return version
    combined = version_with(store.combined, split)
    if combined is None:
        raise DataError(f"{store.combined}: has no version of the testing split {split[:12]}")
    registered = Path(champion.archive)
    here = store.checkpoint(registered.parent.parent.name) / registered.parent.name / MODEL_FILE  # in a moved home, too
    archive = here if here.is_file() else registered
    if not archive.is_file():
        raise DataError(f"{registered}: does not exist on this machine")
    _log.info("scoring the champion, version %s, on the testing split of this comparison", champion.version)
    losses = evaluate(LanguageModel.load(archive), store, combined, training)
    with adding(versions) as addition:
        losses.to_parquet(addition.folder / LOSSES_FILE, index=False)
        wanted.write(addition.folder)
    return addition.version
