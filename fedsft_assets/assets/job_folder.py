"""`job_folder/<job>`: what NVFlare takes, built from `jobs/<job>.yaml`."""

import dagster as dg

from fedsft_assets.assets.metadata import code
from fedsft_assets.federation.job_folder import SPEC_FILE, build_job_folder
from fedsft_assets.resources import ModelResource, StoreResource
from fedsft_assets.specs import COMBINED, JobSpec


class JobOverrides(dg.Config):
    """Values for this job folder in place of those in the job's file; what is left out stays as it is there."""

    rounds: int | None = None
    local_epochs: int | None = None
    max_local_steps: int | None = None
    max_evaluation_records: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    seed: int | None = None


def job_folder_asset(spec: JobSpec) -> dg.AssetsDefinition:
    trained_on = {COMBINED if name == COMBINED else f"processed/{name}" for name in spec.datasets}

    @dg.asset(
        key_prefix="job_folder",
        name=spec.name,
        group_name="job_folders",
        kinds={"nvflare"},
        deps=[dg.AssetKey(key.split("/")) for key in sorted({*trained_on, COMBINED})],
        description=f"{spec.description}: the NVFlare job folder of jobs/{spec.name}.yaml.",
    )
    def job_folder(config: JobOverrides, store: StoreResource, model: ModelResource) -> dg.MaterializeResult:
        report = build_job_folder(spec.override(**config.model_dump()), model.load(), store.files)
        folder = store.files.job_folder(spec.name)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(report.digest),
            metadata={
                "sites": len(spec.sites),
                "path": dg.MetadataValue.path(folder),
                "files": code("\n".join(report.files)),
                "job": code((folder / SPEC_FILE).read_text(encoding="utf-8"), "json"),
            },
        )

    return job_folder
