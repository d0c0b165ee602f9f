"""Finds out from NVFlare's log at the site why a trainer ended before its job did."""

import json
import re
import signal
from dataclasses import dataclass

FAILURE_MARK = "fedsft-failure: "  # followed by the trainer's traceback, JSON-encoded on one line

# Messages of NVFlare's external_process_backend, while waiting for a trainer and while fetching a result,
# and torchrun's message about the first process that failed.
_EXIT = re.compile(
    r"trainer process(?: group)? exited(?: \(rc=(?P<code>-?\d+)\))?"
    r"|result source died before transfer completion \(rc=(?P<lost>-?[1-9]\d*)\)"
    r"|failed \(exitcode: (?P<device>-?\d+)\) local_rank: \d+ \(pid: \d+\)"
)


@dataclass(frozen=True)
class TrainerFailure:
    """A trainer that ended before its job did; `has_traceback`: the reason is its own traceback."""

    reason: str
    has_traceback: bool


def first_failure(log: str) -> TrainerFailure | None:
    """The first failure in a log, or None."""
    return next((failure for failure in map(read_line, log.splitlines()) if failure), None)


def read_line(line: str) -> TrainerFailure | None:
    """The failure in a line of a site's log, or None."""
    if FAILURE_MARK in line:
        return TrainerFailure(json.loads(line.split(FAILURE_MARK, 1)[1]), has_traceback=True)
    if match := _EXIT.search(line):
        code = match["code"] or match["lost"] or match["device"]
        return TrainerFailure(_explain_exit(int(code) if code else None), has_traceback=False)
    return None


def _explain_exit(code: int | None) -> str:
    if code is None:
        return "the trainer process ended"
    if code >= 0:
        return f"the trainer process ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    cause = "; the usual cause is running out of memory" if name == "SIGKILL" else ""
    return f"the trainer process was killed by signal {-code} ({name}){cause}"
