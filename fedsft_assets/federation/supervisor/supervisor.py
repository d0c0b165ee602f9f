"""The process that stands between Dagster and a running job.

It hands the job to its runtime, or finds the one that an earlier attempt handed in; passes on what happens as events;
fetches what the job made, and writes the checkpoint. When it is told to stop it ends the job. When whoever started it
is gone it leaves a job that lives without it alone, for the next attempt to take over.
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
    """Bring the job to its end and write its checkpoint and report into the folder `into`. Raises JobError."""
    supervision = Supervision(job, workspace, runtime)
    try:
        yield from supervision.run()
        if report := supervision.finished(into):
            yield Progress("its checkpoint is stored too")
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
    # Standard output is for events alone; whatever libraries print goes where errors go.
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
    except OSError as error:  # for one, no space left
        print(encode(Failed(f"this machine: {error}", retryable=True)), file=events, flush=True)
    except SystemExit as error:
        code = int(error.code or 0)
    except OrphanedError:
        pass
    finally:
        stop_marked(os.environ[MARK])
    # An open session of NVFlare's keeps an interpreter from ending.
    events.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
