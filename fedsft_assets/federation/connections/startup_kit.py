"""Diagnoses a site's connection, by a TLS handshake with the server in its startup kit.

NVFlare's client retries forever and gives no reason. Requires the standard library only.
"""

import json
import socket
import ssl
import time
from pathlib import Path
from typing import Any

from fedsft_assets.specs.yaml_file import SpecError

_CONNECT_TIMEOUT = 10.0
_REFUSAL_TIMEOUT = 2.0  # a server rejects a client's certificate only after the handshake
_EXPIRED = 10  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED


def diagnose_connection(kit: Path, patience: float = 0.0) -> str | None:
    """The problem between the kit and its server, and what to do; None if each accepts the other's certificate.

    An unreachable server is retried for `patience` seconds. Raises SpecError for a folder that is not the startup kit
    of a site.
    """
    server, client = _configuration(kit)
    startup = kit / "startup"
    host, port = _address(kit, server)
    authority = startup / str(client["ssl_root_cert"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # NVFlare itself compares the name with the kit
    try:
        context.load_verify_locations(authority)
        context.load_cert_chain(startup / str(client["ssl_cert"]), startup / str(client["ssl_private_key"]))
    except (OSError, ssl.SSLError) as error:
        return f"{startup}: cannot read the certificates ({error}); get the startup kit again"
    deadline = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((host, port), _CONNECT_TIMEOUT) as plain:
                return _handshake(context, plain, f"{host}:{port}", kit)
        except OSError as error:
            if time.monotonic() >= deadline:
                return (
                    f"cannot reach the server at {host}:{port} ({error}); check that it is running and that its port is"
                    " reachable"
                )
            time.sleep(0.5)


def _handshake(context: ssl.SSLContext, plain: socket.socket, address: str, kit: Path) -> str | None:
    project = f"the startup kit {kit} ({_project(context)})"
    try:
        with context.wrap_socket(plain) as secured:
            secured.settimeout(_REFUSAL_TIMEOUT)
            try:
                refused = "it closed the connection" if secured.recv(1) == b"" else None
            except TimeoutError:
                refused = None  # it waits for a request
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            return f"the certificate of the server at {address} has expired; provision the federation again"
        return (
            f"the server at {address} and {project} do not belong to the same federation: the server's certificate is"
            f" not signed by the kit's authority ({error.verify_message}); use the kit that was provisioned with this"
            " server, or correct the server's address in it"
        )
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            return f"{address} does not speak TLS: it is not the server of a federation; correct the address in {kit}"
        refused = error.reason or str(error)
    except ConnectionResetError:
        refused = "it reset the connection"
    if refused is None:
        return None
    return (
        f"the server at {address} does not accept the certificate of {project}: {refused}; the certificate has"
        " expired or belongs to another federation; get a new kit from the person who provisioned the server"
    )


def _configuration(kit: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The server and client sections of the kit's configuration."""
    path = kit / "startup" / "fed_client.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        server, client = content["servers"][0], content["client"]
    except FileNotFoundError as error:
        raise SpecError(f"{kit}: startup/fed_client.json is missing; expected the startup kit of a site") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise SpecError(f"{path}: not a valid configuration of a site's startup kit: {error}") from error
    return server, client


def _address(kit: Path, server: dict[str, Any]) -> tuple[str, int]:
    target = str(server.get("service", {}).get("target", ""))
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise SpecError(f"{kit / 'startup' / 'fed_client.json'}: servers: target: expected host:port, found {target!r}")
    return host, int(port)


def _project(context: ssl.SSLContext) -> str:
    """The project, which is named by the authority that the context trusts."""
    authorities: list[dict[str, Any]] = list(context.get_ca_certs())
    names = {key: value for one in authorities for part in one["subject"] for key, value in part}
    return f"project {names.get('commonName', '?')!r}"
