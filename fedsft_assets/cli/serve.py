"""The command `fedsft serve`: answer prompts over HTTP with a registered version, on loopback, behind a token."""

import argparse
import json
import socket
import sys
from typing import Any

from fedsft_assets.cli.ui.start import model_server, serve
from fedsft_assets.credentials import redact
from fedsft_assets.settings import Settings
from fedsft_assets.specs.model_preset import model_preset
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets.tracking import Tracking, registered_model
from fedsft_assets.tracking.lookup import NoModelError, find_version, model_folder

_PREFERRED_PORT = 5001
_EXAMPLE = json.dumps({"inputs": ["What is the capital of Norway?"]})


def add_commands(commands: Any) -> None:
    """Add it to the subcommands of `fedsft`."""
    serving = commands.add_parser(
        "serve", help="answer prompts over HTTP with a registered model, on this machine only"
    )
    serving.add_argument("job", nargs="?", help="the job whose newest version to serve; without it, the champion")
    serving.add_argument("--port", type=int, help=f"default: {_PREFERRED_PORT}, or any free port")


def run(args: argparse.Namespace, settings: Settings) -> None:
    tracking = Tracking.of(settings)
    try:
        listener = _listen_at(args.port) if args.port else None
        version = find_version(tracking, registered_model(model_preset(settings.model).name), args.job)
        print(f"{version.name} version {version.version}, of job {version.tags.get('job')}", flush=True)
        with model_folder(tracking, version, settings.home / "cache" / "served_model") as folder:
            serve(settings, [model_server(folder, listener, _PREFERRED_PORT, _EXAMPLE)])
    except (NoModelError, SpecError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        pass  # while the model is downloaded
    except OSError as error:
        sys.exit(f"{redact(str(error))}")


def _listen_at(port: int) -> socket.socket:
    try:
        return socket.create_server(("127.0.0.1", port), backlog=128)
    except (OSError, OverflowError) as error:
        sys.exit(f"--port: {port} cannot be used: {error}; choose another, or leave it out for a free one")
