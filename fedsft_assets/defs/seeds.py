"""A study over several seeds: a Dagster partition of job folders, checkpoints and evaluations for each."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import dagster as dg
from dagster._core.storage.tags import PARTITION_NAME_TAG

from fedsft_assets.specs.job import DEFAULT_SEED
from fedsft_assets.store import Store

STUDY_RUNS = "fedsft/study_runs"
"""Run tag: the Dagster runs of one study so far, whose versions a later run of it takes; ids with commas between."""


def seed_partitions(seeds: Sequence[int]) -> dg.StaticPartitionsDefinition | None:
    """A partition for each seed; None for a study over one."""
    return dg.StaticPartitionsDefinition(list(map(str, seeds))) if len(seeds) > 1 else None


def partition_of(tags: Mapping[str, str]) -> str | None:
    """The partition of a run, by its tags; None of a run without."""
    return tags.get(PARTITION_NAME_TAG)


def of_partition(files: Store, partition: str | None) -> Store:
    """The part of the store for a partition. The default seed has no part of its own, so that a study over one seed
    can be extended to several."""
    seed = int(partition) if partition else DEFAULT_SEED
    return Store(files.home, None if seed == DEFAULT_SEED else seed)


def of_study(runs: Sequence[str], seed: int | None = None) -> dict[str, str]:
    """Tags of a run that takes the versions of these runs, for one seed or without."""
    return {STUDY_RUNS: ",".join(runs), **({PARTITION_NAME_TAG: str(seed)} if seed is not None else {})}


def study_runs(run_id: str, tags: Mapping[str, str]) -> list[str]:
    """Ids of the runs whose versions this run takes: its own, then those of its study."""
    return [run_id, *filter(None, tags.get(STUDY_RUNS, "").split(","))]


def by_seed(versions: Path | Mapping[str, Path]) -> list[Path]:
    """The versions of an upstream asset, in the order of its seeds."""
    return [versions] if isinstance(versions, Path) else list(versions.values())
