"""The controller that runs at the server: rounds of training at the sites, averaged into the global model.

Requires torch, NVFlare and pydantic only. The model itself is never built: weights are named tensors.
"""

import gc
import os
import tarfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.app_common.workflows.model_controller import ModelController
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.cellnet.defs import ReturnCode as CellReturnCode
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.private.defs import CellMessageHeaderKeys

from fedsft_assets.federation.connections.local_driver import require_local_driver
from fedsft_assets.federation.protocol.journal import (
    Progress,
    Regroup,
    Started,
    Stopped,
)
from fedsft_assets.federation.protocol.messages import (
    EXECUTIONS_KEY,
    JOURNAL_COMMAND,
    KIND_KEY,
    PROGRESS_CHANNEL,
    PROGRESS_TOPIC,
    STATE_ROOT,
    TRAIN_TASK,
    VALIDATE_TASK,
    VERSION,
    VERSION_KEY,
    Wire,
    other_version,
)
from fedsft_assets.federation.protocol.site_messages import (
    NotFiniteError,
    RoundLimits,
    points_of,
    quoted,
)
from fedsft_assets.federation.protocol.state_folder import execution_folder
from fedsft_assets.federation.server.liveness import SiteWatch
from fedsft_assets.federation.server.newcomers import Newcomers, RegroupError
from fedsft_assets.federation.server.presence import Part, look_at
from fedsft_assets.federation.server.rounds import Rounds
from fedsft_assets.federation.server.state import remove_archived
from fedsft_assets.federation.server.task_results import TaskResults
from fedsft_assets.federation.server.unreadable_results import tell_of_unreadable_results
from fedsft_assets.federation.transport import TensorEndpoint, piece_size_for, temporary_files, tensor_streams
from fedsft_assets.memory import keep_message_memory

_NOISE_ALONE = 10.0  # noise-to-update ratio beyond which noise alone explains divergence

T = TypeVar("T")


class NotEnoughSitesError(RuntimeError):
    """Fewer than `min_sites` sites can answer a round."""


class FederatedSFT(ModelController):
    """Train for `num_rounds` from a `.nemo` base model; results are averaged by tokens, metrics go to the journal.

    Without `base_model` there is no initial model: each site starts from the same freshly initialized adapters. A
    round's `val_loss` scores the global model that the sites received, so a model is scored in the round after it was
    made, and the last one in a final validation task. A round continues without sites that fail or are silent for
    `site_timeout` seconds, as long as `min_sites` answer. Finished rounds are saved to disk: a server restarted for the
    same execution resumes from there.

    Site messages are checked on arrival against `limits`, and against the other sites' results with `max_update_ratio`.
    An invalid message excludes the site from the round, or ends the job if fewer than `min_sites` remain.

    `package` is the version of this package that built the job. `noise_ratio` is the expected norm of the noise in the
    mean of all sites, relative to the norm of a clipped change.

    NVFlare does not deploy a running job to sites that connect, or restart, later. If an operator follows the job, it
    then ends after the round to be resubmitted to all sites connected by then.
    """

    def __init__(
        self,
        sites: list[str],
        num_rounds: int,
        limits: dict[str, Any],
        base_model: str | None = None,
        min_sites: int | None = None,
        site_timeout: float = 1800.0,
        wire: str = "fp32",
        algorithm: dict[str, Any] | None = None,
        package: str | None = None,
        noise_ratio: float | None = None,
        max_update_ratio: float | None = None,
    ) -> None:
        super().__init__(persistor_id="", ignore_result_error=True, task_check_period=0.1)
        self.sites = sorted(sites)
        self.num_rounds = num_rounds
        self.limits = limits
        self.base_model = base_model
        self.min_sites = len(sites) if min_sites is None else min_sites
        self.site_timeout = site_timeout
        self.wire = wire
        self.algorithm = algorithm or {"name": "fedavg"}
        self.package = package
        self.noise_ratio = noise_ratio
        self.max_update_ratio = max_update_ratio
        self._limits = RoundLimits.model_validate(limits)
        self._watch = SiteWatch(self.sites, site_timeout)

    # Called by NVFlare.

    def start_controller(self, fl_ctx: FLContext) -> None:
        super().start_controller(fl_ctx)
        keep_message_memory()
        gc.freeze()  # modules loaded so far are never garbage: later collections skip them
        self.open(self.state_folder())
        self.engine.register_app_command(JOURNAL_COMMAND, self.hand_out_journal)
        cell = getattr(self.engine.server, "job_cell", None) or self.engine.get_cell()  # in the simulator: get_cell
        cell.core_cell.register_request_cb(PROGRESS_CHANNEL, PROGRESS_TOPIC, self.take_report)
        tell_of_unreadable_results(self._refuse_unreadable, self.note_lost)
        if not fl_ctx.get_prop(FLContextKey.SIMULATE_MODE, False):  # the simulator's sites never reconnect
            require_local_driver("fedsft-server configure")
            job_id = fl_ctx.get_job_id()
            self.watch_presence(lambda: look_at(cell, self.sites, job_id))

    def run(self) -> None:
        done, complete = self.state.progress.finished, False
        self.journal.add([Started(done)])
        if self.noise_ratio and self.noise_ratio > 1:
            self.journal.add([Progress(f"{self._noise}: training progress will show only over many rounds, if at all")])
        try:
            self.begin()
            with self._tensor_streams(), self.newcomers.watched():
                for number in range(done, self.num_rounds):
                    self.run_round(number)
                    if number + 1 < self.num_rounds:
                        self.newcomers.require_none()
                self.rounds.score(
                    self._broadcast_task(VALIDATE_TASK, self.num_rounds, self.review.score, self.review.odd_scores)
                )
                self.state.commit_progress()
                complete = True
        except _AbortedError:
            self.info("Job aborted.")
        except RegroupError as error:
            self.state.progress.sent_for = error.sites
            self.state.commit_progress()
            self.journal.add([Regroup(error.sites)])
            self.panic(str(error))
        except (ValueError, OSError, tarfile.TarError, NotEnoughSitesError) as error:
            with suppress(OSError):  # on a full disk, only NVFlare's log has it
                self.journal.add([Stopped(str(error), isinstance(error, NotEnoughSitesError))])
            self.panic(str(error))
        except Exception as error:  # a bug: a retry would hit it again
            with suppress(OSError):
                self.journal.add([Stopped(f"the job's server process failed: {error!r}\n{traceback.format_exc()}")])
            self.panic(repr(error))
        finally:
            self.rounds.publish(Path(self.get_run_dir()), complete)

    @property
    def _noise(self) -> str:
        return f"the noise in a round's mean has {self.noise_ratio:,.3g} times the norm of a clipped change"

    @property
    def _divergence_hint(self) -> str:
        rate = "try a lower learning rate"
        if not self.noise_ratio or self.noise_ratio < 1:
            return rate
        noise = f"{self._noise}: lower filters.privacy.noise_multiplier"
        return noise if self.noise_ratio > _NOISE_ALONE else f"{noise}, or {rate}"

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.CLIENT_DISCONNECTED:
            self._watch.gone(fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME))

    def _accept_train_result(
        self,
        client_name: str,
        result: Shareable,
        fl_ctx: FLContext,  # noqa: ARG002
        is_unknown_task: bool = False,
    ) -> bool:
        """Record a site whose task failed or whose result is unreadable; by default NVFlare would end the job."""
        if is_unknown_task:
            return False
        code = result.get_return_code()
        if code != ReturnCode.OK:
            known = code if isinstance(code, str) and code in vars(ReturnCode).values() else "no reason given"
            self._watch.lost(client_name, f"its trainer exited ({known})")
            return False
        try:
            FLModelUtils.from_shareable(result)
        except Exception as error:  # NVFlare would only log it and accept the result
            self._watch.refuse(client_name, f"its result is not an NVFlare model: {quoted(error)}")
            return False
        return True

    def _prepare_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        self._watch.heard(client_task.client.name)
        # By default NVFlare sends a deep copy; nothing modifies these tensors while the task is running.
        client_task.task._broadcast_data = client_task.task.data
        super()._prepare_task_data(client_task, fl_ctx)

    def watch_presence(self, look: Callable[[], Mapping[str, Part]]) -> None:
        """Poll the sites' presence with `look` while the job runs."""
        self.newcomers.look_with({client.name for client in self.engine.get_clients()}, look)

    # Rounds.

    def open(self, folder: Path) -> None:
        """Resume from the state in the folder, or create it."""
        self.rounds = Rounds(
            folder,
            self._limits,
            Wire(self.wire),
            self.algorithm,
            len(self.sites),
            all_needed=self.min_sites == len(self.sites),
            max_update_ratio=self.max_update_ratio,
        )
        self.state, self.journal = self.rounds.state, self.rounds.journal
        self.global_model, self.review = self.rounds.global_model, self.rounds.review
        self.newcomers = Newcomers(self.sites, self.state.progress, self.journal, self._watch)

    def run_round(self, number: int) -> None:
        """Run one round (0-based) and save the next global model to disk."""
        self.rounds.finish(
            number, self._broadcast_task(TRAIN_TASK, number, self.review.update, self.review.odd_updates)
        )

    # Tasks and their results.

    def _refuse(self, site: str, error: ValueError, what: str = "") -> None:
        """Exclude a site after an invalid message; if training diverged, add a hint about the cause."""
        diverged = isinstance(error, NotFiniteError)
        self._watch.refuse(site, f"{error}; {self._divergence_hint}" if diverged else f"{what}{error}")

    def begin(self) -> None:
        """Load the global model. Raises ValueError if another version of this package built the job."""
        if self.package and (wrong := other_version(self.package, "server")):
            raise ValueError(wrong)
        self.global_model.load(self.base_model)

    def _broadcast_task(
        self,
        task: str,
        number: int,
        take: Callable[[str, FLModel], T],
        compare: Callable[[Mapping[str, T]], dict[str, str]],
    ) -> dict[str, T]:
        """Send a task to all sites and process each result as it arrives; returns results by site.

        `take` converts one result, raising ValueError if it is invalid; `compare` returns the sites whose results
        conflict with the others', with the reason. Raises NotEnoughSitesError, ValueError, or any other error raised by
        `take`.
        """
        connected = {client.name for client in self.engine.get_clients()}
        self.review.begin(number)
        self._watch.begin(connected)
        results = TaskResults(take, self._watch, self._refuse)
        for kind, targets in self.global_model.recipients(connected).items():
            message = FLModel(
                params=self.global_model.tensors(kind),
                params_type=ParamsType.FULL,
                current_round=number,
                total_rounds=self.num_rounds,
                meta={KIND_KEY: str(kind), VERSION_KEY: VERSION, EXECUTIONS_KEY: self.state.executions()},
            )
            self.send_model(task_name=task, targets=targets, data=message, callback=results.receive)
        while not results.errors and self._watch.waits(self.min_sites) and self.get_num_standing_tasks():
            self._pause()
        self.cancel_all_tasks()
        while self.get_num_standing_tasks() and not self.abort_signal.triggered:  # after an abort, tasks never end
            time.sleep(self._task_check_period)
        if self.abort_signal.triggered:
            raise _AbortedError
        if len(results) < self.min_sites and not results.errors and not self._watch.refused:
            self.newcomers.wait_for_return(self._pause)
        what = "the final validation" if task == VALIDATE_TASK else f"round {number + 1}"
        taken = results.close(compare, self.min_sites, what)
        self._settle(what, number, taken)
        return taken

    def _pause(self) -> None:
        if self.abort_signal.triggered:
            raise _AbortedError
        time.sleep(self._task_check_period)

    def _settle(self, what: str, number: int, results: Collection[str]) -> None:
        """Record which sites a round continues without; raise if it cannot continue."""
        refused = self._watch.refused
        too_few = len(results) < self.min_sites
        if too_few and refused:
            raise ValueError("\n".join(f"{what}: {site}: {why}" for site, why in sorted(refused.items())))
        missed = [self._watch.missed(site, number + 1) for site in self.sites if site not in results]
        if too_few:
            self.newcomers.require_none()
        if too_few or number < self.num_rounds:
            self.journal.add(missed)
        else:
            self.journal.add(Progress(f"{one.site} · missing from {what}: {one.reason}") for one in missed)
        if too_few:
            raise NotEnoughSitesError(
                f"{what} has results of {len(results)} of {len(self.sites)} sites; min_sites is {self.min_sites}"
            )

    # The journal.

    def take_report(self, message: Any) -> Message:
        """Journal a site's progress report and acknowledge it; the site resends it until acknowledged.

        Reports become durable when the round is saved: an unfinished round is measured again after a crash.
        """
        site = self._sender(message)
        if site is None:
            return make_reply(CellReturnCode.UNAUTHENTICATED)
        self._watch.heard(site)
        if site not in self._watch.refused:
            self.note_report(site, message.payload)
        return make_reply(CellReturnCode.OK)

    def note_report(self, site: str, content: Any) -> None:
        """Validate a site's JSON report and journal it. Raises OSError."""
        try:
            report = self.review.report(site, content)
        except ValueError as error:
            self._refuse(site, error, "a message: ")
            return
        if report:
            self.journal.add([Progress(f"{site} · {report.text}"), *points_of(site, report.points)], durable=False)

    def _refuse_unreadable(self, message: Any, why: str) -> None:
        if site := self._sender(message):
            self._watch.refuse(site, f"its result is unreadable: {quoted(why)}")

    def note_lost(self, message: Any, why: str) -> None:
        """Record that the sender of a result was gone before its tensors had arrived."""
        if site := self._sender(message):
            self._watch.lost(site, f"its result did not arrive: {quoted(why)}")

    def _sender(self, message: Any) -> str | None:
        """The site that the message's NVFlare token belongs to; None, with a warning, for an unknown token."""
        token = message.get_header(CellMessageHeaderKeys.TOKEN)
        for client in self.engine.get_clients():
            if token and client.token == token:
                return str(client.name)
        self.warning(f"ignored a message from {message.get_header(MessageHeaderKey.ORIGIN)}: not a site of this job")
        return None

    def hand_out_journal(self, _topic: str, cmd_data: Any, _fl_ctx: FLContext) -> dict[str, Any]:
        """The journal from an offset on, for an operator, and the offset of its end."""
        self.newcomers.note_follower()
        text, offset = self.journal.read(int(cmd_data["offset"]))
        return {"text": text, "offset": offset}

    # Files.

    def state_folder(self) -> Path:
        """The folder of this execution's state; removes those that are archived."""
        workspace, job_id = self.engine.get_workspace(), self.fl_ctx.get_job_id()
        root = Path(os.environ.get(STATE_ROOT) or Path(workspace.get_root_dir()) / "fedsft")
        own = execution_folder(Path(workspace.get_job_meta_path(job_id)), root, job_id)
        remove_archived(root, but=own)
        return own

    @contextmanager
    def _tensor_streams(self) -> Iterator[None]:
        """Stream tensors while the block lasts; results are kept on disk, beside the state, until averaged."""
        with (
            temporary_files(self.state.folder / "results", self.global_model.largest_result) as results,
            tensor_streams(TensorEndpoint(piece_size_for(len(self.sites)), files=results)),
        ):
            yield


class _AbortedError(Exception):
    """NVFlare aborted the job."""
