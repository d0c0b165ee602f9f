"""The URI of a tracking server or store, without what opens it.

It is written down in many places: resources, events, logs, terminals. The password is known to the processes alone that
talk to MLflow.
"""

import os

from fedsft_assets.credentials import credentials_in, without_credentials

URI = "MLFLOW_TRACKING_URI"
_USER, _PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"

_as_given: dict[str, str] = {}


def take_credentials(uri: str) -> str:
    """The URI without what opens it, which this process keeps for MLflow.

    Those of a server go where MLflow looks for them, into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of this
    process's environment, and out of its MLFLOW_TRACKING_URI. A database is opened by nothing but its whole URI.
    """
    public = without_credentials(uri)
    if public == uri:
        return uri
    if not uri.startswith(("http://", "https://")):
        _as_given[public] = uri
        return public
    found = credentials_in(uri)
    if found and all(found):
        os.environ[_USER], os.environ[_PASSWORD] = found
    if os.environ.get(URI) == uri:
        os.environ[URI] = public
    return public


def as_given(uri: str) -> str:
    """The URI that `take_credentials` was given, in this process, where MLflow needs it."""
    return _as_given.get(uri, uri)
