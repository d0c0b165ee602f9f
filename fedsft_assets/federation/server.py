"""What runs at the server: rounds of training at the sites, and the global model that they make together.

It needs torch and NVFlare only. Nothing of the model is built here: weights are tensors with names.
"""

import gc
import json
import math
import os
import shutil
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from nvflare.apis.analytix import AnalyticsData
from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.dxo import from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, FLMetaKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.workflows.model_controller import ModelController

from fedsft_assets.federation.allocator import collect_messages
from fedsft_assets.federation.averaging import TokenWeightedAverage, rounded
from fedsft_assets.federation.exchange import (
    BEST_MODEL,
    CONTROL,
    FAILURE_KEY,
    FIRST_KEY,
    JOURNAL_COMMAND,
    KIND_KEY,
    LAST_MODEL,
    POINTS_KEY,
    PROGRESS_RECORD,
    SAMPLES_KEY,
    STATE_ROOT,
    TRAIN_TASK,
    VALIDATE_TASK,
    VERSION,
    VERSION_KEY,
    Kind,
    Wire,
)
from fedsft_assets.federation.execution_folder import execution_folder
from fedsft_assets.federation.journal import JOURNAL_FILE, Finished, Journal, Progress, RoundDone, Started, Stopped
from fedsft_assets.federation.merged_curves import merged_train_loss, merged_val_loss
from fedsft_assets.federation.metrics import points_from_data
from fedsft_assets.federation.server_base_model import own_base_model, read_nemo_weights
from fedsft_assets.federation.server_optimizer import ServerOptimizer
from fedsft_assets.federation.server_state import ServerState
from fedsft_assets.federation.stream_receiving import tensors_stored_in
from fedsft_assets.federation.stream_sending import addend
from fedsft_assets.federation.tensor_stream import send_tensors_as_streams
from fedsft_assets.federation.watch import SiteWatch
from fedsft_assets.model.memory import give_back_freed_memory


class NotEnoughSitesError(RuntimeError):
    """A round cannot have as many results as the job asks for."""


class FederatedSFT(ModelController):
    """Rounds from a `.nemo` base model on, whose results are averaged by tokens; every point is written down.

    Without `base_model` the first model is empty: each site then begins with adapters of its own, all the same.
    A round's `val_loss` is that of the global model that the sites received, so a model is scored one round after it
    was made, and the last one in a validation task of its own. A round goes on without sites that fail or fall
    silent for `site_timeout` seconds as long as `min_sites` answer. What a finished round made is on the disk: a
    server that is started again for the same execution goes on from there.
    """

    def __init__(
        self,
        sites: list[str],
        num_rounds: int,
        base_model: str | None = None,
        min_sites: int | None = None,
        site_timeout: float = 1800.0,
        wire: str = "fp32",
        algorithm: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(persistor_id="", ignore_result_error=True, task_check_period=0.1)
        self.sites = sorted(sites)
        self.num_rounds = num_rounds
        self.base_model = base_model
        self.min_sites = len(sites) if min_sites is None else min_sites
        self.site_timeout = site_timeout
        self.wire = wire
        self.algorithm = algorithm or {"name": "fedavg"}
        self._wire = Wire(wire)
        self._watch = SiteWatch(self.sites, site_timeout)
        self._weights: dict[str, torch.Tensor] = {}
        self._change: dict[str, torch.Tensor] = {}
        self._optimizer: ServerOptimizer | None = None
        self._control: dict[str, torch.Tensor] = {}  # the usual direction of all sites together, of SCAFFOLD
        self._holders: set[str] = set()  # sites with the model to which the last change is to be added
        self._lock = threading.Lock()

    # What NVFlare calls.

    def start_controller(self, fl_ctx: FLContext) -> None:
        super().start_controller(fl_ctx)
        send_tensors_as_streams(peers=len(self.sites))  # without it, NVFlare cannot send tensors
        gc.freeze()  # what is loaded by now stays: collections need not look through it again
        self.open(self._state_folder())
        self.engine.register_app_command(JOURNAL_COMMAND, self._hand_out_journal)

    def run(self) -> None:
        done, complete = self.state.progress.finished, False
        self.journal.add([Started(done)])
        try:
            self._begin()
            with self._offloaded():
                for number in range(done, self.num_rounds):
                    self.play_round(number)
                results = self._ask(VALIDATE_TASK, self.num_rounds, lambda _site, _result: None)
                self.score(results)
                if not self.state.progress.best_round:
                    raise ValueError("no round made a model with a finite loss; try a lower learning rate")
                self.state.commit_progress()
                complete = True
        except _AbortedError:
            self.info("The job is aborted.")
        except (ValueError, OSError, tarfile.TarError, NotEnoughSitesError) as error:
            with suppress(OSError):  # on a full disk, NVFlare's log must do
                self.journal.add([Stopped(str(error), isinstance(error, NotEnoughSitesError))])
            self.panic(str(error))
        finally:
            self._hand_over(complete)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == "fed.analytix_log_stats":
            self._take_progress(fl_ctx.get_prop(FLContextKey.EVENT_DATA))
        elif event_type == EventType.CLIENT_DISCONNECTED:
            self._watch.gone(fl_ctx.get_prop(FLContextKey.DISCONNECTED_CLIENT_NAME))

    def _accept_train_result(
        self,
        client_name: str,
        result: Shareable,
        fl_ctx: FLContext,  # noqa: ARG002
        is_unknown_task: bool = False,
    ) -> bool:
        """Note a site that could not do its task; NVFlare's own way ends the job."""
        code = result.get_return_code()
        if is_unknown_task or code == ReturnCode.OK:
            return not is_unknown_task
        self._watch.lost(client_name, f"its trainer is gone ({code})")
        return False

    def _prepare_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        self._watch.heard(client_task.client.name)
        # NVFlare would send a copy, lest somebody changes the tensors; here nobody does before the task is over.
        client_task.task._broadcast_data = client_task.task.data
        super()._prepare_task_data(client_task, fl_ctx)

    # A round.

    def open(self, folder: Path) -> None:
        """Take up the state in the folder, or begin one there."""
        self.state = ServerState(folder)
        self.journal = Journal(folder / JOURNAL_FILE)

    def play_round(self, number: int) -> None:
        """One round (0-based), from the global model to the next one on the disk."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self._weights.items()}
        average, control = TokenWeightedAverage(shapes or None), TokenWeightedAverage()

        def take(site: str, result: FLModel) -> None:
            directions = {name: result.params.pop(name) for name in list(result.params) if name.startswith(CONTROL)}
            self._add(average, site, result)
            if directions:
                control.add(site, directions, 1)

        self.finish_round(number, average, control, self._ask(TRAIN_TASK, number, take))

    def finish_round(
        self,
        number: int,
        average: TokenWeightedAverage,
        control: TokenWeightedAverage,
        results: Mapping[str, FLModel],
    ) -> None:
        """Score the model that was sent, and make the next one."""
        self.score(results)
        progress = self.state.progress
        points = {site: points_from_data(result.meta[POINTS_KEY]) for site, result in results.items()}
        trained = {site: result.meta[SAMPLES_KEY] for site, result in results.items()}
        self.journal.add(merged_train_loss(points, trained, progress.samples, number + 1))
        self._apply(average)
        self._turn(control)
        for site, samples in trained.items():
            progress.samples[site] = progress.samples.get(site, 0) + samples
        progress.finished = number + 1
        self.state.commit_round(self._optimizer.kept() if self._optimizer else self._control)
        self._holders = set(results)
        self.journal.add([RoundDone(number + 1)])

    def score(self, results: Mapping[str, FLModel]) -> None:
        """Write down how good the model is that the sites were given, and whether it is the best so far."""
        progress = self.state.progress
        points = [point for result in results.values() for point in points_from_data(result.meta[POINTS_KEY])]
        whole = merged_val_loss(points, progress.finished, sum(progress.samples.values()))
        self.journal.add([whole, *points])
        loss = whole.value
        self.info(f"val_loss {loss:.4f} after {progress.finished} rounds")
        better = progress.best_loss is None or loss < progress.best_loss
        if progress.finished > 0 and math.isfinite(loss) and better:
            progress.best_loss, progress.best_round = loss, progress.finished

    def _begin(self) -> None:
        if self.state.progress.finished:
            self._weights = self.state.weights()
        elif self.base_model:
            weights = read_nemo_weights(own_base_model(Path(self.base_model), os.environ))
            self._weights = self.state.write_weights(0, weights, weights.pop)  # there they take no memory
            give_back_freed_memory()
        if self.algorithm["name"] == "scaffold":
            self._control = self.state.algorithm()

    def _ask(self, task: str, number: int, take: Callable[[str, FLModel], None]) -> dict[str, FLModel]:
        """Give all sites a task of a round, and take each result as it arrives; returns them by site, without tensors.

        Raises NotEnoughSitesError, or what `take` raises.
        """
        connected = {client.name for client in self.engine.get_clients()}
        self._watch.begin(connected)
        results: dict[str, FLModel] = {}
        errors: list[Exception] = []

        def received(result: FLModel) -> None:
            with self._lock:
                site = result.meta["client_name"]
                self._watch.heard(site)
                try:
                    if failure := result.meta.get(FAILURE_KEY):
                        self._watch.failed(site, failure)
                        return
                    take(site, result)
                except Exception as error:  # NVFlare logs what a callback raises, and goes on
                    errors.append(error)
                    return
                result.params = None
                results[site] = result
                self._watch.done(site)

        for kind, targets in self._recipients(connected).items():
            message = FLModel(
                params={**(self._weights if kind == Kind.FULL else self._change), **self._control},
                params_type=ParamsType.FULL,
                current_round=number,
                total_rounds=self.num_rounds,
                meta={KIND_KEY: str(kind), VERSION_KEY: VERSION},
            )
            self.send_model(task_name=task, targets=targets, data=message, callback=received)
        while not errors and self._watch.waits(self.min_sites) and self.get_num_standing_tasks():
            if self.abort_signal.triggered:
                raise _AbortedError
            time.sleep(self._task_check_period)
        self.cancel_all_tasks()
        while self.get_num_standing_tasks() and not self.abort_signal.triggered:  # aborted, nobody ends them any more
            time.sleep(self._task_check_period)
        if self.abort_signal.triggered:
            raise _AbortedError
        with self._lock:
            self._settle(number, results, errors)
            return dict(sorted(results.items()))

    def _settle(self, number: int, results: Mapping[str, FLModel], errors: list[Exception]) -> None:
        """Say which sites a round goes on without; raise why it cannot."""
        last_score = number == self.num_rounds
        what = "the last model's score" if last_score else f"round {number + 1}"
        if errors:
            raise ValueError(f"{what}: {errors[0]}") from errors[0]
        missed = [self._watch.missed(site, number + 1) for site in self.sites if site not in results]
        few = len(results) < self.min_sites
        if few or not last_score:
            self.journal.add(missed)
        if few:
            raise NotEnoughSitesError(
                f"{what} has results of {len(results)} of {len(self.sites)} sites; min_sites is {self.min_sites}"
            )

    def _recipients(self, connected: set[str]) -> dict[Kind, list[str]]:
        """Who gets what: the last change is for sites that have the model to which it is added."""
        holders = self._holders & connected if self._change else set()
        groups = {Kind.CHANGE: sorted(holders), Kind.FULL: sorted(connected - holders)}
        return {kind: sites for kind, sites in groups.items() if sites}

    def _add(self, average: TokenWeightedAverage, site: str, result: FLModel) -> None:
        first = result.meta.get(FIRST_KEY)
        progress = self.state.progress
        if progress.first is None and not average.sites:
            progress.first = first
        if first != progress.first:
            others = ", ".join(average.sites) or "the sites before"
            raise ValueError(
                f"{site}: began with another base model or other adapters than {others};"
                " all sites need the same base model and the same version of this package"
            )
        kind = result.meta.get(KIND_KEY)
        expected = Kind.CHANGE if self._weights else Kind.FULL
        if kind != expected:
            raise ValueError(f"{site}: sent {kind!r} where {str(expected)!r} was to come; are the versions the same?")
        tokens = result.meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        average.add(site, result.params, tokens, whole=kind == Kind.FULL)

    def _apply(self, average: TokenWeightedAverage) -> None:
        """Make the next global model of the averaged results and write it, one tensor after the other."""
        self._change = {}
        collect_messages()  # the last task holds the change that it was sent with
        give_back_freed_memory()
        number = self.state.progress.finished + 1
        if not self._weights:
            first = dict(average.tensors())
            self._weights = self.state.write_weights(number, first, first.__getitem__)
            return
        if self.algorithm["name"] == "fedopt" and self._optimizer is None:
            self._optimizer = ServerOptimizer(self.algorithm, self._weights, self.state.algorithm())

        def moved(name: str) -> torch.Tensor:
            weight, mean = self._weights[name], average.mean(name)
            if mean is None:
                return weight
            change = rounded(self._optimizer.change(name, mean) if self._optimizer else mean, self._wire)
            if self._wire == Wire.BF16_DIFF:
                self._change[name] = addend(change, name, number)
            return weight.add(change).to(weight.dtype)

        self._weights = self.state.write_weights(number, dict(self._weights), moved)
        average.clear()
        give_back_freed_memory()

    def _turn(self, control: TokenWeightedAverage) -> None:
        """Move the direction of all sites by what those that answered changed of theirs."""
        share = len(control.sites) / len(self.sites)
        for name, mean in control.tensors():
            change = mean.mul_(share)
            self._control[name] = self._control[name].add_(change) if name in self._control else change

    # What is written down.

    def _take_progress(self, data: Shareable) -> None:
        """What a site says while it works; points may come this way before the result that has them too."""
        record = AnalyticsData.from_dxo(from_shareable(data))
        if record is None or record.tag != PROGRESS_RECORD:
            return
        self._watch.heard(data.get_peer_prop(ReservedKey.IDENTITY_NAME, ""))
        said = json.loads(record.value)
        self.journal.add([Progress(said["text"]), *points_from_data(said["points"])], durable=False)

    def _hand_out_journal(self, _topic: str, cmd_data: Any, _fl_ctx: FLContext) -> dict[str, Any]:
        text, offset = self.journal.read(int(cmd_data["offset"]))
        return {"text": text, "offset": offset}

    # Where things are.

    def _state_folder(self) -> Path:
        workspace, job_id = self.engine.get_workspace(), self.fl_ctx.get_job_id()
        root = Path(os.environ.get(STATE_ROOT) or Path(workspace.get_root_dir()) / "fedsft")
        return execution_folder(Path(workspace.get_job_meta_path(job_id)), root, job_id)

    def _hand_over(self, complete: bool) -> None:
        """Leave in the job's own folder what is to be fetched, and end the state of a job that is done."""
        run_dir, progress = Path(self.get_run_dir()), self.state.progress
        if complete:
            _link(self.state.model_file(progress.finished), run_dir / LAST_MODEL)
            _link(self.state.model_file(progress.best_round), run_dir / BEST_MODEL)
            self.journal.add([Finished()])
        _link(self.journal.path, run_dir / JOURNAL_FILE)
        if complete and STATE_ROOT not in os.environ:
            shutil.rmtree(self.state.folder, ignore_errors=True)

    @contextmanager
    def _offloaded(self) -> Iterator[None]:
        """Results wait on the disk, beside the state, until they are averaged."""
        results = self.state.folder / "results"
        shutil.rmtree(results, ignore_errors=True)  # of a server that was killed
        with tensors_stored_in(results):
            yield


class _AbortedError(Exception):
    """Whoever runs the job ended it."""


def _link(source: Path, target: Path) -> None:
    """Make `target` the content that `source` has now, at no cost where both are on one disk."""
    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    try:
        os.link(source, fresh)
    except OSError:
        shutil.copyfile(source, fresh)
    os.replace(fresh, target)
