"""What travels between the server part of a job, its sites and its operator beside the tensors, by name."""

from enum import StrEnum

VERSION = "3"  # of all this; server and sites must have the same

TRAIN_TASK = "train"
VALIDATE_TASK = "validate"

# In the metadata of a task.
KIND_KEY = "kind"
VERSION_KEY = "version"

# In the metadata of a result.
POINTS_KEY = "points"
SAMPLES_KEY = "samples"
FIRST_KEY = "first"  # digests of the base model and the adapters that a site began with, if it made them itself
FAILURE_KEY = "failure"  # why the site can do nothing more in this job

# What an algorithm sends beside the weights has tensors' names behind it.
CONTROL = "control:"

# NVFlare's analytics record in which a site says what it is doing; its value is JSON.
PROGRESS_RECORD = "fedsft"

# The admin command that hands out the journal of a running job.
JOURNAL_COMMAND = "fedsft_journal"

# Names, in the job's `meta.json`, the execution that a submitted job belongs to.
EXECUTION_KEY = "fedsft_execution"

# Names the folder under which the server keeps the state of executions; without it, one in the server's workspace.
STATE_ROOT = "FEDSFT_SERVER_STATE"
SITE_STATE_ROOT = "FEDSFT_SITE_STATE"  # the same at a site

# Names the folder of the datasets and base models that jobs may use at a site, and of the base models at the server.
SITE_HOME = "FEDSFT_SITE_HOME"

# What the server part of a finished job leaves in its folder, beside the journal.
LAST_MODEL = "last_global_model.pt"
BEST_MODEL = "best_global_model.pt"


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
