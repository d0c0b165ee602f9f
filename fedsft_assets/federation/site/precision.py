"""The precision a site computes in: the plan's, or, if that is `auto`, one chosen once per execution.

The choice is kept in the site's state, so that a restarted trainer, on any machine, continues the curves in the same
precision.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from fedsft_assets.federation.protocol.whole_file import whole_file
from fedsft_assets.federation.site.cpu_slots import turn
from fedsft_assets.federation.site.ranks import word_of_rank_0
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.devices.interface import require_devices
from fedsft_assets.model.training.precision_trial import Trial, faster_precision
from fedsft_assets.specs.job import Precision
from fedsft_assets.specs.plan import SitePlan

_FILE, _FIELD = "precision.json", "precision"
_DECIDED = [precision for precision in get_args(Precision) if precision != "auto"]


class SitePrecisionError(RuntimeError):
    """The precision file in the site's state is invalid."""


def site_precision(
    model: LanguageModel, tokens: Sequence[Tokens], plan: SitePlan, state: Path | None, waiting: Callable[[], object]
) -> Trial:
    """The precision for this execution, and why it was chosen; with several devices, rank 0 decides.

    `state` is the folder of the site's state, which outlives a trainer; `waiting` is called once a minute while waiting
    for a CPU slot. Raises SitePrecisionError naming the file, and OSError.
    """
    if plan.training.precision != "auto":
        return Trial(plan.training.precision, "")

    def decide() -> str:
        trial = _kept(state / _FILE) if state else None
        if trial is None:
            with turn(waiting):
                trial = faster_precision(model, tokens, plan)
            if state:
                _keep(state / _FILE, trial.precision)
        return json.dumps(trial)

    if plan.training.devices == 1:
        return Trial(*json.loads(decide()))
    require_devices(plan.training.devices, int(os.environ.get("WORLD_SIZE", "1")))
    return Trial(*json.loads(word_of_rank_0("precision", decide)))


def _kept(path: Path) -> Trial | None:
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[_FIELD]
    except (ValueError, TypeError, KeyError):
        found = path.read_text(encoding="utf-8", errors="replace")
    if found not in _DECIDED:
        raise SitePrecisionError(
            f"{path}: {_FIELD}: found {found!r}, expected one of {', '.join(_DECIDED)}; write the one named in"
            " this site's log of the job"
        )
    return Trial(found, "as chosen at the start of this execution")


def _keep(path: Path, precision: Precision) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(json.dumps({_FIELD: precision}).encode())
