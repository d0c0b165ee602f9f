"""What NVFlare's simulator starts at each client of the overhead benchmark: the training loop with its client API."""

import sys
from pathlib import Path

import nvflare.client as flare

from benchmarks.overhead.input import Input
from benchmarks.overhead.torch_loop import Loop


def main() -> None:
    given = Input(Path(sys.argv[1]))
    site, rounds = given.site(sys.argv[2]), given.part.rounds
    flare.init()
    loop = Loop(given)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        loop.load(received.params)
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"val_loss": loop.validate(site.site, rounds)}))
            continue
        metrics = {"val_loss": loop.validate(site.site, received.current_round)}
        tokens = loop.train(site, received.current_round)
        flare.send(flare.FLModel(params=loop.weights(), metrics=metrics, meta={"NUM_STEPS_CURRENT_ROUND": tokens}))


if __name__ == "__main__":
    main()
