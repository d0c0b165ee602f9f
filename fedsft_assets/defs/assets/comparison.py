"""`comparison`: one table and one plot over all jobs."""

from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from fedsft_assets.defs.metadata import image
from fedsft_assets.defs.resources import StoreResource
from fedsft_assets.evaluation.comparison import compare, plot, write_table
from fedsft_assets.execution import CheckpointInputs
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.files import file_digest
from fedsft_assets.model.split_loss import split_loss
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import split_file
from fedsft_assets.versions import adding


def comparison_asset(jobs: Sequence[JobSpec]) -> dg.AssetsDefinition:
    @dg.asset(
        group_name="comparison",
        kinds={"markdown", "matplotlib"},
        ins={f"checkpoint_{job.name}": dg.AssetIn(["checkpoint", job.name]) for job in jobs},
        description="All jobs and the base model side by side, on the combined splits.",
    )
    def comparison(store: StoreResource, **checkpoints: Path) -> dg.MaterializeResult[Path]:
        files = store.files
        inputs = CheckpointInputs.read(next(iter(checkpoints.values())))
        plan = JobFolder.read(files.home / inputs.job_folder).located_plans[0]
        base = split_loss(plan.base_model, split_file(inputs.combined(files), "testing"), plan)
        result = compare([JobReport.read(checkpoint) for checkpoint in checkpoints.values()], base.loss)
        with adding(files.report("comparison")) as addition:
            write_table(result, addition.folder / "comparison.md")
            plot(result.reports, addition.folder / "comparison.png")
        table, chart = addition.version / "comparison.md", addition.version / "comparison.png"
        return dg.MaterializeResult(
            value=addition.version,
            data_version=dg.DataVersion(file_digest(table)),
            metadata={
                "table": dg.MetadataValue.md(result.markdown()),
                "validation loss": image(chart),
                **{f"{report.job}: best validation loss": round(report.best_val_loss, 4) for report in result.reports},
                "base model's validation loss": round(result.reports[0].base_val_loss, 4),
                "table file": dg.MetadataValue.path(table),
                "plot file": dg.MetadataValue.path(chart),
            },
        )

    return comparison
