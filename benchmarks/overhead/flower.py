"""The overhead benchmark's work in Flower's simulation: a FedAvg server app over as many clients as there are sites.

It needs `flwr[simulation]`, torch and transformers, and nothing of fedsft.
"""

import argparse
import os
import tempfile
from pathlib import Path

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.overhead.flower_client import INPUT, app
from benchmarks.overhead.input import Input


def run(given: Input, into: Path, cpus: float | None) -> None:
    """Write the final model to `into`. `cpus` are those of a client, in place of Flower's default."""
    server = ServerApp()

    @server.main()
    def main(grid: Grid, _context: Context) -> None:
        import torch

        from benchmarks.overhead.torch_loop import Loop

        sites = len(given.sites)
        strategy = FedAvg(min_train_nodes=sites, min_evaluate_nodes=sites, min_available_nodes=sites)
        initial = ArrayRecord(Loop(given).weights())
        result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=given.part.rounds)
        torch.save(result.arrays.to_torch_state_dict(), into)

    os.environ[INPUT] = str(given.folder)
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch:  # a short path: it holds sockets
        backend: dict[str, dict[str, float | str]] = {
            "init_args": {"_node_ip_address": "127.0.0.1", "_temp_dir": scratch}
        }
        if cpus:
            backend["client_resources"] = {"num_cpus": cpus, "num_gpus": 0.0}
        run_simulation(server, app, num_supernodes=len(given.sites), backend_config=backend)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path)
    parser.add_argument("into", type=Path)
    parser.add_argument("--cpus", type=float)
    args = parser.parse_args()
    run(Input(args.input), args.into, args.cpus)
