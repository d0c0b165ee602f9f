"""`job_folder/<job>`: the NVFlare job folder, built from `jobs/<job>.yaml`."""

from pathlib import Path

import dagster as dg

from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.metadata import code
from fedsft_assets.defs.resources import ModelResource, StoreResource
from fedsft_assets.federation.job_folder import SPEC_FILE, JobInputs, build_job_folder
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.specs.yaml_file import SpecError


class JobOverrides(dg.Config):
    """Overrides of the values in the job's file; fields that are left out keep the file's value."""

    rounds: int | None = None
    local_epochs: float | None = None
    max_local_steps: int | None = None
    max_evaluation_records: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    seed: int | None = None


def job_folder_asset(spec: JobSpec, seeds: dg.PartitionsDefinition | None = None) -> dg.AssetsDefinition:
    own = {name: dg.AssetIn(["processed", name]) for name in spec.datasets if name != COMBINED}

    @dg.asset(
        key_prefix="job_folder",
        name=spec.name,
        group_name="job_folders",
        kinds={"nvflare"},
        partitions_def=seeds,
        ins={
            **{f"processed_{name}": asset for name, asset in sorted(own.items())},
            COMBINED: dg.AssetIn(COMBINED),
            "base_model": dg.AssetIn("base_model"),
        },
        description=f"{spec.description}: the NVFlare job folder of jobs/{spec.name}.yaml.",
    )
    def job_folder(
        context: dg.AssetExecutionContext,
        config: JobOverrides,
        store: StoreResource,
        model: ModelResource,
        combined: Path,
        base_model: Path,
        **processed: Path,
    ) -> dg.MaterializeResult[Path]:
        datasets = {**{path.parent.name: path for path in processed.values()}, COMBINED: combined}
        inputs = JobInputs(base_model, combined, datasets)
        changes = config.model_dump()
        with as_dagster_failure(SpecError):
            if context.has_partition_key:
                changes["seed"] = _only(int(context.partition_key), config.seed)
            report = build_job_folder(spec.override(**changes), model.load(), store.of_run(context.run), inputs)
        folder, noise = report.folder, report.noise
        return dg.MaterializeResult(
            value=folder,
            data_version=dg.DataVersion(report.data_version),
            metadata={
                "sites": len(spec.sites),
                "path": dg.MetadataValue.path(folder),
                **({"noise in a round, in clips": round(noise.of_round, 2)} if noise else {}),
                "files": code("\n".join(report.files)),
                "job": code((folder / SPEC_FILE).read_text(encoding="utf-8"), "json"),
            },
        )

    return job_folder


def _only(partition: int, seed: int | None) -> int:
    """The seed of a partition. Raises SpecError if the launchpad asks for another one."""
    if seed not in (None, partition):
        raise SpecError(f"seed: {seed}, but this is the partition of seed {partition}; leave the field out")
    return partition
