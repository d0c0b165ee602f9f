"""Federated supervised fine-tuning as one Dagster asset graph."""

import os

__version__ = "0.2.0"

# Whatever a process writes that has this package loaded is its owner's alone, and so is what the processes write that
# it starts: NVFlare's, Dagster's, MLflow's. None of them asks, so it is said here, where no entry can forget it.
os.umask(0o077)
