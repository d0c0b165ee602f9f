"""The MLflow run of a study: the losses of its jobs with their intervals, and its report."""

from __future__ import annotations

import math
from pathlib import Path

from fedsft_assets.evaluation.comparison import SHOWN_BASE_MODEL
from fedsft_assets.evaluation.report.study import Study
from fedsft_assets.specs.job import BASE_MODEL
from fedsft_assets.store import Store
from fedsft_assets.tracking import Outbox, Tracking
from fedsft_assets.tracking.promotion import within
from fedsft_assets.tracking.record import Ending, TrackedExecution

_NAME = "comparison"
_SECONDS = 15.0  # what is not delivered by then stays in the outbox


def record_study(study: Study, version: Path, tags: dict[str, str], store: Store, tracking: Tracking) -> None:
    """Give MLflow the run of this comparison, now or later; a version has one run, however often it is made.

    Metrics are `system/study_<job>_test_loss` with `_low` and `_high` of its 95 % interval, and `_deviation` over
    seeds, if there are several: MLflow shows other groups before the curves of jobs, and `system` after them. Artifacts
    are the files of the version.
    """
    files = sorted(version.iterdir())
    at = round(files[0].stat().st_mtime, 3)
    note = f"{study.recommendation.headline}. {study.recommendation.why}"
    execution = TrackedExecution(version.name, _NAME, [], _params(study), tags, note, at)
    outbox = Outbox(store.outbox)
    outbox.put(execution, [], Ending("FINISHED", at, _metrics(study)), files)
    within(min(_SECONDS, tracking.patience), lambda: outbox.deliver(tracking))


def _params(study: Study) -> dict[str, str]:
    runs = study.comparison.runs
    seeds = sorted({report.seed for reports in runs.values() for report in reports if report.seed is not None})
    return {"jobs": ", ".join(runs), "seeds": ", ".join(map(str, seeds)), "base_model": study.base_model.name}


def _metrics(study: Study) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for model, found in study.comparison.scores.items():
        name = f"system/study_{BASE_MODEL if model == SHOWN_BASE_MODEL else model}_test_loss"
        values = {"": found.value, "_low": found.low, "_high": found.high, "_deviation": found.deviation}
        metrics |= {
            f"{name}{end}": value for end, value in values.items() if value is not None and math.isfinite(value)
        }
    return metrics
