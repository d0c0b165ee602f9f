"""What the supervisor of a job tells whoever started it: one JSON object a line on its standard output."""

import json
from dataclasses import asdict, dataclass

from fedsft_assets.federation.journal import Missed, Progress
from fedsft_assets.federation.metrics import Point
from fedsft_assets.federation.report import JobReport


@dataclass(frozen=True)
class Failed:
    """The job failed; `lost` means that something died or was cut off, so that another attempt may go on with it."""

    reason: str
    lost: bool = False


Event = Progress | Point | Missed | JobReport | Failed
_KINDS = {"progress": Progress, "point": Point, "missed": Missed, "report": JobReport, "failed": Failed}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode(event: Event) -> str:
    return json.dumps({"event": _NAMES[type(event)], **asdict(event)})


def decode(line: str) -> Event:
    """Raises ValueError for a line that is no event."""
    data = json.loads(line)
    if not isinstance(data, dict) or data.get("event") not in _KINDS:
        raise ValueError(f"expected an event, found {line!r}")
    return _KINDS[data.pop("event")](**data)
