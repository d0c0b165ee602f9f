"""What travels between the server part of a job, its sites and its operator beside the tensors, by name."""

from enum import StrEnum

from fedsft_assets import __version__

VERSION = "5"  # of all this; server and sites must have the same

TRAIN_TASK = "train"
VALIDATE_TASK = "validate"

# In the metadata of a task.
KIND_KEY = "kind"
VERSION_KEY = "version"
EXECUTIONS_KEY = "executions"  # that the server can go on with: what a site keeps for others is of no use

# In the metadata of a result.
TOKENS_KEY = "NUM_STEPS_CURRENT_ROUND"  # that a round trained on; NVFlare's name for what results are weighted by
SAMPLES_KEY = "samples"
RECORDS_KEY = "records"  # that a site trains on
FIRST_KEY = "first"  # digests of the base model and the adapters that a site began with, if it made them itself
FAILURE_KEY = "failure"  # why the site can do nothing more in this job

# What an algorithm sends beside the weights has tensors' names behind it.
CONTROL = "control:"

# By which a trainer reports to the server, as JSON; the answer is OK when the server's journal has it.
PROGRESS_CHANNEL = "fedsft"
PROGRESS_TOPIC = "progress"

# The admin command that hands out the journal of a running job.
JOURNAL_COMMAND = "fedsft_journal"

# Names, in the job's `meta.json`, the execution that a submitted job belongs to.
EXECUTION_KEY = "fedsft_execution"

# Names the folder under which the server keeps the state of executions; without it, one in the server's workspace.
STATE_ROOT = "FEDSFT_SERVER_STATE"
SITE_STATE_ROOT = "FEDSFT_SITE_STATE"  # the same at a site

# Names the home of a study: on its machine, what a job names is found there.
STUDY_HOME = "FEDSFT_HOME"

# Names the folder of the datasets and base models that jobs may use at a site, and of the base models at the server.
SITE_HOME = "FEDSFT_SITE_HOME"

# What the server part of a finished job leaves in its folder, beside the journal.
LAST_MODEL = "last_global_model.pt"
BEST_MODEL = "best_global_model.pt"


def other_version(built_with: str, here: str) -> str | None:
    """What is wrong if a job was built with another version of this package than is installed `here`."""
    if built_with == __version__:
        return None
    return (
        f"the job was built with fedsft-assets {built_with}, this {here} has {__version__}; install the same version at"
        " both"
    )


class Kind(StrEnum):
    """What the tensors of a message are."""

    FULL = "full"
    """All weights."""
    CHANGE = "change"
    """What to add to the weights that the receiver has, or that the sender was given."""


class Wire(StrEnum):
    """In which numbers weights travel."""

    FP32 = "fp32"
    BF16_DIFF = "bf16-diff"
    """Changes in bf16, added to weights in fp32; whoever has no weights yet gets all of them in fp32."""
