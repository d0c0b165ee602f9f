"""The server's part of a job without a server: sites that answer, fail or say nothing, in a test's own process."""

import json
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
from nvflare.fuel.f3.message import Message
from nvflare.private.defs import CellMessageHeaderKeys

from fedsft_assets.federation.protocol.costs import SERVER_CPU_SECONDS
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Entry, from_line
from fedsft_assets.federation.protocol.messages import (
    KIND_KEY,
    RECORDS_KEY,
    SAMPLES_KEY,
    VALIDATE_TASK,
    VERSION,
    VERSION_KEY,
    Kind,
    Wire,
)
from fedsft_assets.federation.protocol.points import Point, points_to_data
from fedsft_assets.federation.protocol.site_messages import RoundLimits
from fedsft_assets.federation.server.controller import FederatedSFT
from fedsft_assets.specs.plan import LocalWork

Weights = dict[str, torch.Tensor]
# What a site does with a task: a result, None for silence, or a return code of NVFlare's for a trainer that is gone.
Answer = FLModel | None | str
BATCH = 16
POINTS_KEY = "points"  # where a site here has what it reports before its result


def weights(seed: int, size: float = 1.0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    return {
        "embedding": torch.randn(50, 8, generator=generator) * size,
        "layer.weight": torch.randn(8, 8, generator=generator) * size,
        "layer.scale": torch.randn((), generator=generator) * size,
    }


def copied(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


class Site:
    """Sends changes that follow from its name and the round alone, and keeps the global model as a site does."""

    def __init__(self, name: str, steps: int = 3, tokens: int | None = None, wire: Wire = Wire.FP32) -> None:
        """Each step trains on a batch, the k-th on 100 k tokens, or the last one on what is left of `tokens`."""
        self.name, self.steps, self.wire = name, steps, wire
        self.tokens = [100 * step for step in range(1, steps + 1)]
        if tokens is not None:
            self.tokens = [1] * (steps - 1) + [tokens - steps + 1]
        self.number = int(name.rsplit("-", 1)[1])
        self.losses = [7.0, 4.0, 3.0, 2.0]  # of the model after so many rounds
        self.model: Weights = {}
        self.given: list[tuple[str, str]] = []
        self.answers: dict[tuple[str, int], Callable[[FLModel], Answer]] = {}

    def does(self, task: str, round_number: int, answer: Callable[[FLModel], Answer]) -> None:
        """Something else than usual with the task of that round (0-based)."""
        self.answers[task, round_number] = answer

    def __call__(self, task: str, received: FLModel) -> Answer:
        kind = received.meta[KIND_KEY]
        assert received.meta[VERSION_KEY] == VERSION
        self.given.append((task, kind))
        if kind == Kind.CHANGE:
            for name, change in received.params.items():
                self.model[name] = self.model[name] + change
        else:
            self.model = copied(received.params)
        usual = self.validate if task == VALIDATE_TASK else self.train
        return self.answers.get((task, received.current_round), usual)(received)

    def validate(self, received: FLModel) -> FLModel:
        return self._result({POINTS_KEY: points_to_data([self._val_loss(received.current_round)])})

    def train(self, received: FLModel, **meta: Any) -> FLModel:
        number = received.current_round
        before, after = self.records * number, self.records * (number + 1)
        steps = [
            Point("train_loss", 9.0 - step, number + 1, before + BATCH * step, self.name, step, tokens)
            for step, tokens in enumerate(self.tokens, start=1)
        ]
        local = Point("val_loss_local", 0.5, number + 1, after, self.name, tokens=40)
        points = [self._val_loss(number), *steps, local]
        change = {name: tensor * 0.01 for name, tensor in weights(1000 * self.number + number).items()}
        if self.wire == Wire.BF16_DIFF:
            change = {name: tensor.to(torch.bfloat16) for name, tensor in change.items()}
        known = {
            KIND_KEY: str(Kind.CHANGE if received.params else Kind.FULL),
            FLMetaKey.NUM_STEPS_CURRENT_ROUND: sum(self.tokens),
            SAMPLES_KEY: self.records,
            RECORDS_KEY: self.records,
            POINTS_KEY: points_to_data(points),
        }
        return self._result({**known, **meta}, change)

    @property
    def records(self) -> int:
        return BATCH * self.steps

    def _val_loss(self, finished: int) -> Point:
        return Point("val_loss", self.losses[finished], finished, self.records * finished, self.name, tokens=40)

    def _result(self, meta: dict[str, Any], params: Weights | None = None) -> FLModel:
        kind = ParamsType.FULL if params is not None else None
        return FLModel(params_type=kind, params=params, metrics={}, meta={**meta, "client_name": self.name})


class Server(FederatedSFT):
    """The workflow in a folder of the test's, without NVFlare's engine around it."""

    def __init__(self, folder: Path, sites: Iterable[Site], **arguments: Any) -> None:
        self.members = {site.name: site for site in sites}
        limits = RoundLimits(
            work=LocalWork(local_epochs=1, max_local_steps=None, batch_size=BATCH),
            precision="32",
            max_length=1_000_000,
            validation_records=10,
            records={site.name: site.records for site in self.members.values()},
        )
        known = {"sites": list(self.members), "num_rounds": 3, "base_model": "base.nemo", "limits": limits.model_dump()}
        super().__init__(**{**known, **arguments})
        self._task_check_period = 0.001
        self.folder = folder
        self.engine, self.fl_ctx, self.abort_signal = self, FLContext(), Signal()
        self.connected = list(self.members)
        self.panics: list[str] = []
        self.warnings: list[str] = []
        self.fobs_context: dict[str, Any] = {}
        self.run_manager = None
        self._standing = 0
        (folder / "job").mkdir(parents=True, exist_ok=True)
        self.open(folder / "state")

    # In place of NVFlare.

    def get_run_dir(self) -> str:
        return str(self.folder / "job")

    def get_clients(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=name, token=f"token of {name}") for name in self.connected]

    def get_cell(self) -> "Server":
        return self

    def get_fobs_context(self) -> dict[str, Any]:
        return self.fobs_context

    def update_fobs_context(self, changes: dict[str, Any]) -> None:
        self.fobs_context.update(changes)

    def send_model(self, task_name: str, targets: list[str], data: FLModel, callback: Callable[..., None]) -> None:  # type: ignore[override]
        for name in targets:
            answer = self.members[name](task_name, data)
            if isinstance(answer, FLModel):
                if POINTS_KEY in answer.meta:
                    points = answer.meta.pop(POINTS_KEY)
                    report = {"id": f"{task_name} {data.current_round}", "text": "busy", "points": points}
                    deliver(self, name, json.dumps(report))
                callback(answer)
            elif answer is None:
                self._standing += 1
            else:
                self._accept_train_result(name, make_reply(answer), self.fl_ctx)
                self._standing += 1

    def get_num_standing_tasks(self) -> int:
        return self._standing

    def cancel_all_tasks(self, **_: Any) -> None:  # type: ignore[override]
        self._standing = 0

    def info(self, msg: str) -> None:
        pass

    def warning(self, msg: str) -> None:
        self.warnings.append(msg)

    def panic(self, reason: str) -> None:
        self.panics.append(reason)

    # What tests look at.

    @property
    def entries(self) -> list[Entry]:
        """The journal without the server's CPU seconds, which are never the same."""
        return [entry for entry in self._journaled() if not _is_cpu(entry)]

    @property
    def cpu_seconds(self) -> list[Point]:
        return [entry for entry in self._journaled() if isinstance(entry, Point) and _is_cpu(entry)]

    def _journaled(self) -> list[Entry]:
        path = self.journal.path if self.journal.path.exists() else self.folder / "job" / JOURNAL_FILE
        return [from_line(line) for line in path.read_text().splitlines()]

    def of(self, kind: type) -> list[Any]:
        return [entry for entry in self.entries if isinstance(entry, kind)]

    def points(self, name: str, site: str | None = None) -> list[Point]:
        return [point for point in self.of(Point) if (point.name, point.site) == (name, site)]

    def left(self, name: str) -> Weights:
        weights: Weights = torch.load(self.folder / "job" / name, weights_only=True)
        return weights


def _is_cpu(entry: Entry) -> bool:
    return isinstance(entry, Point) and entry.name == SERVER_CPU_SECONDS


BASE = weights(0)


def play(server: Server, rounds: int) -> list[Weights]:
    """Rounds without the last validation; the global model after each."""
    server.begin()
    models = []
    for number in range(server.state.progress.finished, rounds):
        server.run_round(number)
        models.append(copied(server.global_model.weights))
    return models


def says(server: Server, site: str, text: str, points: Iterable[Point] = (), **changes: Any) -> None:
    """A report of a site while it works, as NVFlare hands it over."""
    report = {"id": uuid.uuid4().hex, "text": text, "points": points_to_data([*points])}
    deliver(server, site, json.dumps({**report, **changes}))


def deliver(server: Server, site: str, content: Any) -> str:
    """The same, whatever is in it; the code of the answer."""
    headers = {CellMessageHeaderKeys.TOKEN: f"token of {site}", MessageHeaderKey.ORIGIN: "a cell"}
    return str(server.take_report(Message(headers, content)).get_header(MessageHeaderKey.RETURN_CODE))
