"""Jobs for NVFlare that take seconds: a server part that writes a journal and hands it out, sites that do nothing."""

import json
from pathlib import Path

from fedsft_assets.federation.exchange import JOURNAL_COMMAND
from fedsft_assets.federation.journal import JOURNAL_FILE

_SERVER = f'''
import time
from pathlib import Path

from nvflare.apis.impl.controller import Controller


class Scribe(Controller):
    """Writes a line, waits, and so on; then fails if it is told to."""

    def __init__(self, lines, seconds_between, fails):
        super().__init__()
        self.lines, self.seconds_between, self.fails = lines, seconds_between, fails

    def start_controller(self, fl_ctx):
        self.journal = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())) / "{JOURNAL_FILE}"
        fl_ctx.get_engine().register_app_command("{JOURNAL_COMMAND}", self.answer)

    def answer(self, topic, data, fl_ctx):
        content = self.journal.read_bytes()[data["offset"]:] if self.journal.exists() else b""
        return {{"text": content.decode(), "offset": data["offset"] + len(content)}}

    def control_flow(self, abort_signal, fl_ctx):
        for line in self.lines:
            with self.journal.open("a") as file:
                file.write(line + "\\n")
            until = time.monotonic() + self.seconds_between
            while time.monotonic() < until and not abort_signal.triggered:
                time.sleep(0.1)
            if abort_signal.triggered:
                return
        if self.fails:
            raise RuntimeError("the scribe fails")

    def stop_controller(self, fl_ctx):
        pass

    def process_result_of_unknown_task(self, client, task_name, client_task_id, result, fl_ctx):
        pass
'''
_EXECUTOR = {"tasks": ["none"], "executor": {"path": "nvflare.app_common.np.np_trainer.NPTrainer", "args": {}}}


def write_job(
    folder: Path, sites: list[str], lines: list[str], seconds_between: float = 0.2, fails: bool = False
) -> Path:
    """The job folder `folder`, of a job that writes `lines` into its journal."""
    scribe = {"lines": lines, "seconds_between": seconds_between, "fails": fails}
    workflow = {"id": "scribe", "path": "scribe.Scribe", "args": scribe}
    files: dict[str, object] = {
        "meta.json": {
            "name": folder.name,
            "resource_spec": {},
            "min_clients": len(sites),
            "mandatory_clients": sites,
            "deploy_map": {"app_server": ["server"], "app_sites": sites},
        },
        "app_server/config/config_fed_server.json": {"format_version": 2, "workflows": [workflow], "components": []},
        "app_sites/config/config_fed_client.json": {"format_version": 2, "executors": [_EXECUTOR], "components": []},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    custom = folder / "app_server" / "custom"
    custom.mkdir()
    (custom / "scribe.py").write_text(_SERVER, encoding="utf-8")
    return folder
