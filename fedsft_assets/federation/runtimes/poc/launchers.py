"""NVFlare's job launchers, for folders whose paths contain special characters.

NVFlare joins the arguments of a command with spaces and splits them as a shell does; here they are quoted in between.
"""

import os
import shlex
import sys
from collections.abc import Iterable
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.app_common.job_launcher.client_process_launcher import ClientProcessJobLauncher
from nvflare.app_common.job_launcher.server_process_launcher import ServerProcessJobLauncher
from nvflare.app_common.storages import filesystem_storage
from nvflare.fuel.utils import zip_utils
from nvflare.utils.job_launcher_utils import get_client_job_args, get_server_job_args


class ServerLauncher(ServerProcessJobLauncher):
    """Starts a job's server process."""

    def __init__(self) -> None:
        super().__init__()
        # When zipping, NVFlare takes a backslash in a path for a Windows separator.
        for module in (zip_utils, filesystem_storage):
            module.normpath_for_zip = os.path.normpath

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:  # noqa: ARG002
        return _command(fl_ctx, get_server_job_args())


class SiteLauncher(ClientProcessJobLauncher):
    """Starts a job's process at a site."""

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:  # noqa: ARG002
        return _command(fl_ctx, get_client_job_args())


def _command(context: FLContext, names: Iterable[str]) -> str:
    arguments = context.get_prop(FLContextKey.JOB_PROCESS_ARGS)
    words = [sys.executable]
    for option, value in (arguments[name] for name in names if arguments.get(name)):
        many = arguments.get(JobProcessArgs.OPTIONS) == (option, value)
        words += [option, *(value.split() if many else [str(value)])]
    return shlex.join(words)
