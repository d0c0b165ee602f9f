"""The POC as Dagster ops (prepare, start, status, stop), in a job that starts it and one that stops it."""

import dagster as dg

from fedsft_assets.defs.resources import RuntimeResource, StoreResource
from fedsft_assets.federation.runtimes.choose import poc_system
from fedsft_assets.federation.runtimes.poc.runtime import start
from fedsft_assets.federation.runtimes.poc.state import PocStatus
from fedsft_assets.federation.runtimes.poc.system import PocSystem


@dg.op(out=dg.Out(dg.Nothing), description="Create the startup kits of the POC, for all sites of the job files.")
def prepare_poc(store: StoreResource, runtime: RuntimeResource) -> None:
    _system(store, runtime).prepare()


@dg.op(
    ins={"prepared": dg.In(dg.Nothing)},
    out=dg.Out(dg.Nothing),
    description="Start missing processes of the POC, and wait until all its sites are connected.",
)
def start_poc(store: StoreResource, runtime: RuntimeResource) -> None:
    start(_system(store, runtime))


@dg.op(ins={"changed": dg.In(dg.Nothing)}, description="Report the running processes and jobs of the POC.")
def poc_status(context: dg.OpExecutionContext, store: StoreResource, runtime: RuntimeResource) -> None:
    status = _system(store, runtime).status()
    context.log.info(status.describe())
    context.add_output_metadata(_metadata(status))


@dg.op(out=dg.Out(dg.Nothing), description="End all processes of the POC, including running jobs.")
def stop_poc(context: dg.OpExecutionContext, store: StoreResource, runtime: RuntimeResource) -> None:
    context.log.info(f"ended {_system(store, runtime).stop()} processes")


@dg.job(name="poc_start", description="Start the POC of this machine, as every job with the runtime `poc` does.")
def poc_start_job() -> None:
    poc_status(start_poc(prepare_poc()))


@dg.job(name="poc_stop", description="Stop the POC of this machine.")
def poc_stop_job() -> None:
    poc_status(stop_poc())


def _system(store: StoreResource, runtime: RuntimeResource) -> PocSystem:
    return poc_system(store.files.home, runtime.settings())


def _metadata(status: PocStatus) -> dict[str, dg.MetadataValue]:
    return {
        "state": dg.MetadataValue.text(status.state),
        "address": dg.MetadataValue.text(status.address),
        "folder": dg.MetadataValue.path(str(status.folder)),
        "processes": dg.MetadataValue.json(status.services),
        "jobs": dg.MetadataValue.json(status.jobs),
    }
