"""A site of `benchmarks.transfer` without training, in two ways; each is the process that NVFlare starts.

`ours` receives, keeps and sends as this project's trainer does, by its own code. `stock` sends back what it received,
changed in place, as a script of NVFlare's client API may do at its best. Both note when what was there.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.transfer.watch import anonymous_memory

CHANGE = 1.001  # a site's "training": each weight becomes so many times what it was


class Diary:
    """Lines of what was done when, in seconds since the epoch, and this process's memory in bytes."""

    def __init__(self, folder: Path) -> None:
        self._folder, self.round, self.site = folder, 0, ""
        self._lines: list[str] = []
        self._watch_downloads()

    def note(self, what: str, begun: float) -> None:
        line = {
            "what": what,
            "round": self.round,
            "begun": begun,
            "ended": time.time(),
            "memory": anonymous_memory(os.getpid()),
        }
        self._lines.append(json.dumps(line))
        if self.site:
            (self._folder / f"{self.site}.jsonl").write_text("\n".join(self._lines))

    def _watch_downloads(self) -> None:
        """See when tensors begin to come and when all are here; the code that fetches them is NVFlare's as it is."""
        from nvflare.app_opt.pt import tensor_downloader

        real = tensor_downloader.download_object

        def watched(*args: Any, **kwargs: Any) -> None:
            begun = time.time()
            real(*args, **kwargs)
            self.note("down", begun)

        tensor_downloader.download_object = watched


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=("ours", "stock"))
    parser.add_argument("--wire", default="fp32")
    parser.add_argument("--diaries", type=Path, required=True)
    args = parser.parse_args()

    torch.set_num_threads(1)
    diary = Diary(args.diaries)
    work = _Ours(args.wire) if args.way == "ours" else _Stock()
    with work.streams:
        _work(work, diary)


def _work(work: "_Ours | _Stock", diary: Diary) -> None:
    import nvflare.client as flare

    diary.note("idle", time.time())
    flare.init()
    diary.site = work.site = flare.get_site_name()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        result = work.answer(received, flare.is_evaluate())
        del received
        begun = time.time()
        flare.send(result)
        diary.note("up", begun)
        diary.round += 1


class _Stock:
    site = ""
    streams = nullcontext()

    def answer(self, received: Any, evaluates: bool) -> Any:  # noqa: ARG002 the recipe only trains
        from nvflare.app_common.abstract.fl_model import FLModel

        for tensor in received.params.values():
            tensor.mul_(CHANGE)
        return FLModel(params=received.params, metrics={"accuracy": 0.5})


class _Ours:
    """The wire of a site around weights that nobody holds: they are made of the given ones when they are asked for."""

    def __init__(self, wire: str) -> None:
        from fedsft_assets.federation.connections.local_driver import use_local_driver
        from fedsft_assets.federation.protocol.messages import Wire
        from fedsft_assets.federation.site.global_model import SiteExchange
        from fedsft_assets.federation.site.reporter import Reporter, send_through_site
        from fedsft_assets.federation.site.update_filters import ChangeFilter
        from fedsft_assets.federation.transport import TensorEndpoint, tensor_streams
        from fedsft_assets.memory import keep_message_memory
        from fedsft_assets.specs.job import FiltersSpec

        self.site = ""
        use_local_driver()
        self._reporter = Reporter("a site", send_through_site)
        self.exchange = SiteExchange("a site", Wire(wire), ChangeFilter(FiltersSpec()), {})
        self.streams = tensor_streams(TensorEndpoint(deltas=self.exchange))
        keep_message_memory()
        gc.freeze()  # as our trainer does

    def answer(self, received: Any, evaluates: bool) -> Any:
        from nvflare.apis.fl_constant import FLMetaKey
        from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

        from fedsft_assets.federation.protocol.messages import (
            FIRST_KEY,
            KIND_KEY,
            RECORDS_KEY,
            SAMPLES_KEY,
            Kind,
        )
        from fedsft_assets.federation.protocol.points import TRAIN_LOSS, VAL_LOSS, VAL_LOSS_LOCAL, Point

        done = received.current_round
        self.exchange.take(received)
        points = [Point(VAL_LOSS, 1.0 / (1 + done), done, done, tokens=1)]
        if not evaluates:
            points += [
                Point(TRAIN_LOSS, 1.0, done + 1, done + 1, step=1, tokens=1),
                Point(VAL_LOSS_LOCAL, 1.0, done + 1, done + 1, tokens=1),
            ]
        self._reporter.report(f"round {done}", points)
        self._reporter.flush()
        if evaluates:
            return FLModel(metrics={VAL_LOSS: 1.0})
        return FLModel(
            params=self.exchange.changes(self._trained(), Kind.CHANGE),
            params_type=ParamsType.FULL,
            metrics={},
            meta={
                KIND_KEY: str(Kind.CHANGE),
                FLMetaKey.NUM_STEPS_CURRENT_ROUND: 1,
                SAMPLES_KEY: 1,
                RECORDS_KEY: 1,
                FIRST_KEY: None,
            },
        )

    def _trained(self) -> dict[str, Any]:
        return {name: _trained(given.view(-1)) for name, given in self.exchange.given.items()}


def _trained(given: Tensor) -> Callable[[int, int], Tensor]:
    return lambda first, last: given[first:last] * CHANGE


if __name__ == "__main__":
    main()
