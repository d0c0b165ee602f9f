"""Events that a job's supervisor writes to its standard output for its parent, one JSON object per line."""

import json
from dataclasses import asdict, dataclass

from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import Missed, Progress
from fedsft_assets.federation.protocol.points import Point


class JobError(RuntimeError):
    """The job failed; the message tells the user why, with the trainer's traceback if there is one.

    `retryable`: a process died or was interrupted, and another attempt would resume after the last finished round.
    """

    def __init__(self, message: str, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True)
class Failed:
    """A JobError, as an event."""

    reason: str
    retryable: bool = False


Event = Progress | Point | Missed | JobReport | Failed
_KINDS = {"progress": Progress, "point": Point, "missed": Missed, "report": JobReport, "failed": Failed}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode(event: Event) -> str:
    return json.dumps({"event": _NAMES[type(event)], **asdict(event)})


def decode(line: str) -> Event:
    """Raises ValueError if the line is not an event."""
    data = json.loads(line)
    if not isinstance(data, dict) or data.get("event") not in _KINDS:
        raise ValueError(f"expected an event, found {line!r}")
    return _KINDS[data.pop("event")](**data)
