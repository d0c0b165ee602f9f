"""The code location on one screen."""

import dagster as dg

from fedsft_assets.defs.assets.base_model import base_model
from fedsft_assets.defs.assets.checkpoint import checkpoint_asset
from fedsft_assets.defs.assets.comparison import comparison_asset
from fedsft_assets.defs.assets.evaluation import base_model_evaluation, evaluation_asset
from fedsft_assets.defs.assets.inference import inference_asset
from fedsft_assets.defs.assets.job_folder import job_folder_asset
from fedsft_assets.defs.assets.raw import raw_asset
from fedsft_assets.defs.assets.splits import combined_asset, processed_asset
from fedsft_assets.defs.automation import full_study, new_data_sensor, undelivered_tracking, weekly_study
from fedsft_assets.defs.checks import data_checks
from fedsft_assets.defs.nemo_checks import nemo_checks
from fedsft_assets.defs.poc_jobs import poc_start_job, poc_stop_job
from fedsft_assets.defs.resources import resources
from fedsft_assets.evaluation.prompts import load_prompts
from fedsft_assets.home import check_home
from fedsft_assets.settings import Settings
from fedsft_assets.specs.dataset import load_datasets
from fedsft_assets.specs.job import load_jobs, sites_of

settings = Settings()
check_home(settings)
datasets = list(load_datasets(settings.datasets).values())
jobs = load_jobs(settings.jobs, [dataset.name for dataset in datasets])

defs = dg.Definitions(
    assets=[
        *map(raw_asset, datasets),
        *map(processed_asset, datasets),
        combined_asset(datasets),
        base_model,
        *map(job_folder_asset, jobs),
        *map(checkpoint_asset, jobs),
        base_model_evaluation,
        *map(evaluation_asset, jobs),
        comparison_asset(jobs, datasets),
        inference_asset(jobs, load_prompts(settings.prompts)),
    ],
    asset_checks=[*data_checks(datasets), nemo_checks(jobs)],
    jobs=[full_study, poc_start_job, poc_stop_job],
    schedules=[weekly_study],
    sensors=[new_data_sensor(datasets, jobs), undelivered_tracking],
    resources=resources(settings, sites_of(jobs)),
    # Steps are forked from a process with this module preloaded: half a second each instead of several.
    executor=dg.multiprocess_executor.configured(
        {"start_method": {"forkserver": {"preload_modules": ["fedsft_assets.definitions"]}}}
    ),
)
