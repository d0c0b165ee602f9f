"""Names of everything exchanged between a job's server, sites and operator, apart from tensors."""

from enum import StrEnum

from fedsft_assets import __version__

VERSION = "6"  # of the protocol; must be equal at server and sites

TRAIN_TASK = "train"
VALIDATE_TASK = "validate"

# Metadata keys of a task.
KIND_KEY = "kind"
VERSION_KEY = "version"
EXECUTIONS_KEY = "executions"  # that the server can resume; sites delete the state of others

# Metadata keys of a result.
TOKENS_KEY = "NUM_STEPS_CURRENT_ROUND"  # answer tokens trained on in a round; NVFlare's key for the weight of a result
SAMPLES_KEY = "samples"
RECORDS_KEY = "records"  # number of training records of a site
FIRST_KEY = "first"  # digests of a site's initial base model and adapters, if it created them itself
FAILURE_KEY = "failure"  # why the site cannot continue in this job

# Prefix of the names of control variates (SCAFFOLD).
CONTROL = "control:"

# Channel for a trainer's JSON reports; answered OK once the server's journal has them.
PROGRESS_CHANNEL = "fedsft"
PROGRESS_TOPIC = "progress"

# Admin command that returns the journal of a running job.
JOURNAL_COMMAND = "fedsft_journal"

# Key in a submitted job's `meta.json`: the execution that it belongs to.
EXECUTION_KEY = "fedsft_execution"

# Environment variable: folder for the server's state of executions; default: in the server's workspace.
STATE_ROOT = "FEDSFT_SERVER_STATE"
SITE_STATE_ROOT = "FEDSFT_SITE_STATE"  # likewise, at a site

# Environment variable: home of the study, for server and sites on the same machine.
STUDY_HOME = "FEDSFT_HOME"

# Environment variable: folder of datasets and base models that jobs may use at a site or the server.
SITE_HOME = "FEDSFT_SITE_HOME"

# Files in a finished job's folder at the server, beside the journal.
LAST_MODEL = "last_global_model.pt"
BEST_MODEL = "best_global_model.pt"


def other_version(built_with: str, here: str) -> str | None:
    """Error text if another version of this package built the job, or None. `here`: "server" or "site"."""
    if built_with == __version__:
        return None
    return (
        f"the job was built with fedsft-assets {built_with}, this {here} has {__version__}; install the same version at"
        " both"
    )


class Kind(StrEnum):
    """What a message's tensors contain."""

    FULL = "full"
    """All weights."""
    CHANGE = "change"
    """Differences to the weights that the receiver has, or that the sender received."""


class Wire(StrEnum):
    """Wire precision."""

    FP32 = "fp32"
    BF16_DIFF = "bf16-diff"
    """Changes in bf16, added to fp32 weights; sites without weights receive the full model in fp32."""
