"""The lines that trainers and NVFlare write, and what of them a person must see.

Trainers mark their lines; NVFlare passes them through its own log, which adds a prefix.
"""

import json
import re
import signal
from dataclasses import dataclass

PROGRESS_MARK = "fedsft-progress: "
FAILURE_MARK = "fedsft-failure: "

_EXIT = re.compile(r"identity=(?P<site>[^,\]]+).*trainer process.* exited.*\(rc=(?P<code>-?\d+)\)")


@dataclass(frozen=True)
class Progress:
    text: str


@dataclass(frozen=True)
class TrainerFailure:
    """A trainer that ended before its job did, and all that is known of why."""

    site: str
    reason: str


def read_line(line: str) -> Progress | TrainerFailure | None:
    """What a line of a log says, or None if it is of no interest."""
    if PROGRESS_MARK in line:
        return Progress(line.split(PROGRESS_MARK, 1)[1].rstrip())
    if FAILURE_MARK in line:
        said = json.loads(line.split(FAILURE_MARK, 1)[1])
        return TrainerFailure(said["site"], said["traceback"])
    if match := _EXIT.search(line):
        return TrainerFailure(match["site"], _explain_exit(int(match["code"])))
    return None


def _explain_exit(code: int) -> str:
    if code >= 0:
        return f"the trainer process ended with exit code {code}"
    name = signal.Signals(-code).name
    cause = "; the usual cause is too little memory" if name == "SIGKILL" else ""
    return f"the trainer process was killed by signal {-code} ({name}){cause}"
