"""The code location on one screen."""

import dagster as dg

from fedsft_assets.defs.assets.base_model import base_model_asset
from fedsft_assets.defs.assets.checkpoint import checkpoint_asset
from fedsft_assets.defs.assets.comparison import comparison_asset
from fedsft_assets.defs.assets.evaluation import base_model_evaluation_asset, evaluation_asset
from fedsft_assets.defs.assets.inference import inference_asset
from fedsft_assets.defs.assets.job_folder import job_folder_asset
from fedsft_assets.defs.assets.raw import raw_asset
from fedsft_assets.defs.assets.splits import combined_asset, processed_asset
from fedsft_assets.defs.automation import new_data_sensor, undelivered_tracking, weekly_study
from fedsft_assets.defs.checks import data_checks
from fedsft_assets.defs.nemo_checks import nemo_checks
from fedsft_assets.defs.poc_jobs import poc_start_job, poc_stop_job
from fedsft_assets.defs.resources import resources
from fedsft_assets.defs.seeds import seed_partitions
from fedsft_assets.defs.study_jobs import study_jobs, study_sensors
from fedsft_assets.evaluation.prompts import load_prompts
from fedsft_assets.home import check_home
from fedsft_assets.settings import Settings
from fedsft_assets.specs.dataset import load_datasets
from fedsft_assets.specs.job import load_jobs, sites_of
from fedsft_assets.specs.model_preset import has_random_weights

settings = Settings()
check_home(settings)
datasets = list(load_datasets(settings.datasets).values())
jobs = load_jobs(settings.jobs, [dataset.name for dataset in datasets if dataset.use == "training"])
seeds = seed_partitions(settings.seeds)
base_seeds = seeds if has_random_weights(settings.model) else None
runs = study_jobs(seeds, base_seeds)

defs = dg.Definitions(
    assets=[
        *map(raw_asset, datasets),
        *map(processed_asset, datasets),
        combined_asset(datasets),
        base_model_asset(base_seeds),
        *(job_folder_asset(job, seeds) for job in jobs),
        *(checkpoint_asset(job, seeds) for job in jobs),
        base_model_evaluation_asset(base_seeds),
        *(evaluation_asset(job, seeds) for job in jobs),
        comparison_asset(jobs, datasets),
        inference_asset(jobs, load_prompts(settings.prompts)),
    ],
    asset_checks=[*data_checks(datasets), nemo_checks(jobs)],
    jobs=[*runs, poc_start_job, poc_stop_job],
    schedules=[weekly_study(runs[0])],
    sensors=[new_data_sensor(datasets, jobs, runs[0]), undelivered_tracking, *study_sensors(seeds, runs)],
    resources=resources(settings, sites_of(jobs)),
    # Steps are forked from a process with this module preloaded: half a second each instead of several.
    executor=dg.multiprocess_executor.configured(
        {"start_method": {"forkserver": {"preload_modules": ["fedsft_assets.definitions"]}}}
    ),
)
