"""Why a site's trainer ended before its job did, from the log that NVFlare keeps at the site."""

import json
import re
import signal
from dataclasses import dataclass

FAILURE_MARK = "fedsft-failure: "  # trainers print their own traceback behind it, in one line

# What NVFlare's external_process_backend says, while it waits for a trainer and while it fetches a result,
# and what torchrun says of the first of a trainer's processes that failed.
_EXIT = re.compile(
    r"trainer process(?: group)? exited(?: \(rc=(?P<code>-?\d+)\))?"
    r"|result source died before transfer completion \(rc=(?P<lost>-?[1-9]\d*)\)"
    r"|failed \(exitcode: (?P<device>-?\d+)\) local_rank: \d+ \(pid: \d+\)"
)


@dataclass(frozen=True)
class TrainerFailure:
    """A trainer that ended before its job did; `has_traceback` tells whether the reason is its own traceback."""

    reason: str
    has_traceback: bool


def first_failure(log: str) -> TrainerFailure | None:
    """The first reason that a log gives, if it gives one."""
    return next((failure for failure in map(read_line, log.splitlines()) if failure), None)


def read_line(line: str) -> TrainerFailure | None:
    """What a line of a site's log says of a failure, or None."""
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
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "of no name"
    cause = "; the usual cause is too little memory" if name == "SIGKILL" else ""
    return f"the trainer process was killed by signal {-code} ({name}){cause}"
