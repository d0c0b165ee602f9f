"""Environments of child processes: the variables of a home, and the subset without secrets.

Processes that may not have secrets (sites and their trainers, a POC, third-party web interfaces) get only the variables
listed here or named by the user. All other exported variables stay with the processes that the user started: the study,
its steps, and Dagster.
"""

import getpass
import os
from collections.abc import Mapping
from pathlib import Path

from fedsft_assets.credentials import PASS, is_secret

# Addresses of the web interfaces under which a process runs, for links between their pages.
DAGSTER_PAGES, MLFLOW_PAGES = "FEDSFT_DAGSTER_PAGES", "FEDSFT_MLFLOW_PAGES"

_NAMES = {
    *(PASS, "PATH", "HOME", "USER", "LOGNAME", "USERNAME", "SHELL", "PWD", "TERM", "TZ", "TMPDIR", "TEMP", "TMP"),
    *("LANG", "LANGUAGE", "HOSTNAME", "COLUMNS", "LINES", "NO_COLOR", "VIRTUAL_ENV", "CONDA_PREFIX"),
    *("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH", "GLIBC_TUNABLES", "NIX_LD", "NIX_LD_LIBRARY_PATH"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH"),
    *("DAGSTER_HOME", "DAGSTER_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY", "MPLCONFIGDIR", "FL_LOG_LEVEL"),
    *("HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "DO_NOT_TRACK"),
    *("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"),
    *("TRANSFORMERS_VERBOSITY", "TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS"),
    *("http_proxy", "https_proxy", "all_proxy", "no_proxy", "grpc_proxy", "no_grpc_proxy"),
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
}
_BEGINNINGS = (
    *("FEDSFT_", "NVFLARE_", "PYTHON", "LC_", "XDG_", "MALLOC_", "GRPC_"),
    *("TORCH", "PYTORCH_", "TRITON_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "HIP_", "HSA_", "ROCR_", "ROCM_"),
    *("CUBLAS_", "CUDNN_", "OMP_", "KMP_", "GOMP_", "MKL_", "OPENBLAS_", "BLIS_", "NUMEXPR_", "VECLIB_"),
    *("ATEN_", "DNNL_", "ONEDNN_"),
)


def child_environment(parent: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of `parent` (default: this process's) for a process that may not have secrets.

    Listed variables are dropped if their names suggest a secret or their values are URLs with a password. Variables
    named in FEDSFT_PASS_ENVIRONMENT are always passed.
    """
    parent = os.environ if parent is None else parent
    named = {name.strip() for name in parent.get(PASS, "").split(",")}
    return {name: value for name, value in parent.items() if name in named or _passes(name, value)}


def forget_secrets() -> None:
    """Remove from this process's environment what `child_environment` would not pass on."""
    for name in os.environ.keys() - child_environment().keys():
        del os.environ[name]


def _passes(name: str, value: str) -> bool:
    return (name in _NAMES or name.startswith(_BEGINNINGS)) and not is_secret(name, value)


def home_environment(home: Path) -> dict[str, str]:
    """Variables that make libraries write only under `home`, and disable their telemetry."""
    cache = home / "cache"
    return {
        **_account(cache),
        "FEDSFT_HOME": str(home),
        "DAGSTER_HOME": str(home / "dagster"),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "HF_HOME": str(cache / "huggingface"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "XDG_CACHE_HOME": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def _account(folder: Path) -> dict[str, str]:
    """Defaults for an account without an entry in the password file, as in a container."""
    missing = {}
    try:
        Path.home()
    except RuntimeError:
        missing["HOME"] = str(folder)
    try:
        getpass.getuser()
    except (KeyError, OSError):
        missing["USER"] = f"uid-{os.getuid()}"
    return missing
