"""The environment of processes: what a home's processes get, and what those get that may know no secrets, which are
sites and their trainers, a POC, and user interfaces of others.

They get what is named here, and what the user names. Whatever else a user has exported, whatever it is called, stays
with the processes that the user started: the study, its steps, and Dagster.
"""

import getpass
import os
from collections.abc import Mapping
from pathlib import Path

from fedsft_assets.credentials import PASS, is_secret

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
    """What of an environment, this process's unless said, goes to a process that may know no secrets.

    Of what is named here, nothing passes that is a secret by its name, or a URL with a password in it. What
    FEDSFT_PASS_ENVIRONMENT names always does.
    """
    parent = os.environ if parent is None else parent
    named = {name.strip() for name in parent.get(PASS, "").split(",")}
    return {name: value for name, value in parent.items() if name in named or _passes(name, value)}


def forget_secrets() -> None:
    """Take out of this process's environment what those that it starts may not know."""
    for name in os.environ.keys() - child_environment().keys():
        del os.environ[name]


def _passes(name: str, value: str) -> bool:
    return (name in _NAMES or name.startswith(_BEGINNINGS)) and not is_secret(name, value)


def home_environment(home: Path) -> dict[str, str]:
    """Variables that keep libraries from writing anywhere but under `home`, and from the network."""
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
    """What libraries ask of an account, for one that the password file does not know, as in a container."""
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
