"""The supervisor process, between Dagster and a running job.

It submits the job to its runtime, or reattaches to one that an earlier attempt submitted; emits events; downloads the
result and writes the checkpoint. When told to stop, it ends the job. When its parent is gone, it leaves a job that
survives it running for the next attempt to reattach to.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.events import Event, Failed, JobError, encode
from fedsft_assets.federation.protocol.journal import EntryError, Progress
from fedsft_assets.federation.protocol.messages import BEST_MODEL
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.federation.runtimes.processes import MARK, stop_marked
from fedsft_assets.federation.supervisor.privacy import ReleasesError
from fedsft_assets.federation.supervisor.supervision import OrphanedError, Supervision
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.specs.runtime import RuntimeSettings
from fedsft_assets.specs.yaml_file import SpecError


def supervise(
    job: JobFolder, workspace: Workspace, testing_file: Path, into: Path, runtime: RuntimeSettings
) -> Iterator[Event]:
    """Complete the job and write its checkpoint and report into the folder `into`. Raises JobError."""
    supervision = Supervision(job, workspace, runtime)
    try:
        yield from supervision.run()
        if report := supervision.finished(into):
            yield Progress("using its stored checkpoint")
            yield report
            return
        yield Progress("writing the checkpoint and scoring it on the combined testing split")
        yield supervision.finish(workspace.result / BEST_MODEL, testing_file, into)
    finally:
        supervision.close()


def _stop(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(128 + _signal)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run one job and write its checkpoint.")
    for name in ("job-folder", "workspace", "testing-file", "into"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--runtime", type=RuntimeSettings.model_validate_json, required=True)
    args = parser.parse_args()
    # Standard output carries events only; anything that libraries print goes to standard error.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    code = 1
    try:
        workspace = Workspace(args.workspace)
        for event in supervise(JobFolder.read(args.job_folder), workspace, args.testing_file, args.into, args.runtime):
            print(encode(event), file=events, flush=True)
        code = 0
    except JobError as error:
        print(encode(Failed(str(error), error.retryable)), file=events, flush=True)
    except (UnavailableError, SpecError, EntryError, ReleasesError) as error:
        print(encode(Failed(str(error))), file=events, flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:  # e.g. a full disk
        print(encode(Failed(f"this machine: {error}", retryable=True)), file=events, flush=True)
    except SystemExit as error:
        code = int(error.code or 0)
    except OrphanedError:
        pass
    finally:
        stop_marked(os.environ[MARK])
    # An open NVFlare session would keep the interpreter from exiting.
    events.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
