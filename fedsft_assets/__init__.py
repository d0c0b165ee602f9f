"""Federated supervised fine-tuning as one Dagster asset graph."""

import os

__version__ = "0.2.0"

# Files written by this process and its children (NVFlare, Dagster, MLflow) are private to their owner. Set on import,
# so that no entry point can forget it.
os.umask(0o077)
