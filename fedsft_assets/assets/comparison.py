"""`comparison`: one table and one plot over all jobs."""

from collections.abc import Sequence

import dagster as dg

from fedsft_assets.assets.metadata import image
from fedsft_assets.evaluation.comparison import compare, plot, write_table
from fedsft_assets.evaluation.losses import split_loss
from fedsft_assets.federation.job_folder import read_plans
from fedsft_assets.federation.report import JobReport
from fedsft_assets.resources import StoreResource
from fedsft_assets.specs import JobSpec
from fedsft_assets.store import file_digest, split_file


def comparison_asset(jobs: Sequence[JobSpec]) -> dg.AssetsDefinition:
    @dg.asset(
        group_name="comparison",
        kinds={"markdown", "matplotlib"},
        deps=[dg.AssetKey(["checkpoint", job.name]) for job in jobs],
        description="All jobs side by side on the combined splits, beside the base model.",
    )
    def comparison(store: StoreResource) -> dg.MaterializeResult:
        files = store.files
        plan = read_plans(files.job_folder(jobs[0].name))[0]
        base = split_loss(plan.base_model, split_file(files.combined, "testing"), plan)
        result = compare([JobReport.read(files.checkpoint(job.name)) for job in jobs], base.loss)
        table, chart = files.reports / "comparison.md", files.reports / "comparison.png"
        write_table(result, table)
        plot(result.reports, chart)
        return dg.MaterializeResult(
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
