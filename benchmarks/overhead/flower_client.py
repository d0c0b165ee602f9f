"""The client app of the overhead benchmark in Flower's simulation, written as in Flower's PyTorch quickstart.

It needs `flwr`, torch and transformers, and nothing of fedsft. Ray imports it in each of its processes; torch is left
to those that train, which makes the simulation start sooner than the quickstart's would.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from benchmarks.overhead.input import Input, SiteInput

if TYPE_CHECKING:
    from benchmarks.overhead.torch_loop import Loop

INPUT = "OVERHEAD_INPUT"  # its folder, in the environment

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Score the received model where no evaluation has, and train it."""
    loop, site, round = _received(message, context)
    if round == 0:
        loop.validate(site.site, round)
    tokens = loop.train(site, round)
    return _reply(message, arrays=ArrayRecord(loop.weights()), metrics=MetricRecord({"num-examples": tokens}))


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the model that a round has made."""
    loop, site, round = _received(message, context)
    loss = loop.validate(site.site, round + 1)
    return _reply(message, metrics=MetricRecord({"val_loss": loss, "num-examples": 1}))


@cache
def _loop() -> tuple[Input, Loop]:
    """A process of Ray's serves many clients, one after the other."""
    from benchmarks.overhead.torch_loop import Loop

    given = Input(Path(os.environ[INPUT]))
    return given, Loop(given)


def _received(message: Message, context: Context) -> tuple[Loop, SiteInput, int]:
    """The loop with the received model, the client's site, and the round (0-based)."""
    given, loop = _loop()
    loop.load(message.content["arrays"].to_torch_state_dict())
    config: ConfigRecord = message.content["config"]
    return loop, given.site(given.sites[int(context.node_config["partition-id"])]), int(config["server-round"]) - 1


def _reply(message: Message, **records: ArrayRecord | MetricRecord) -> Message:
    return Message(content=RecordDict(records), reply_to=message)
