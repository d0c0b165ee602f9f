"""The server's part of small jobs."""

import time
from pathlib import Path
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.signal import Signal

from fedsft_assets.federation.protocol.journal import JOURNAL_FILE
from fedsft_assets.federation.protocol.messages import JOURNAL_COMMAND


class Scribe(Controller):
    """Writes a line, waits, and so on; then fails if it is told to."""

    def __init__(self, lines: list[str], seconds_between: float, fails: bool) -> None:
        super().__init__()
        self.lines, self.seconds_between, self.fails = lines, seconds_between, fails

    def start_controller(self, fl_ctx: FLContext) -> None:
        self.journal = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())) / JOURNAL_FILE
        fl_ctx.get_engine().register_app_command(JOURNAL_COMMAND, self.answer)

    def answer(self, _topic: str, data: dict[str, Any], _context: FLContext) -> dict[str, Any]:
        content = self.journal.read_bytes()[data["offset"] :] if self.journal.exists() else b""
        return {"text": content.decode(), "offset": data["offset"] + len(content)}

    def control_flow(self, abort_signal: Signal, _context: FLContext) -> None:
        for line in self.lines:
            with self.journal.open("a") as file:
                file.write(line + "\n")
            until = time.monotonic() + self.seconds_between
            while time.monotonic() < until and not abort_signal.triggered:
                time.sleep(0.1)
            if abort_signal.triggered:
                return
        if self.fails:
            raise RuntimeError("the scribe fails")

    def stop_controller(self, _context: FLContext) -> None:
        pass

    def process_result_of_unknown_task(self, *_: object) -> None:
        pass
