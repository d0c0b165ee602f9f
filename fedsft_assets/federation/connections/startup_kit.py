"""Why a site cannot connect with its startup kit: what a TLS handshake with the kit's server says.

NVFlare's client tries again for ever and does not say why. Only the standard library is needed.
"""

import json
import socket
import ssl
import time
from pathlib import Path
from typing import Any

from fedsft_assets.specs.yaml_file import SpecError

_SECONDS = 10.0
_SECONDS_TO_REFUSE = 2.0  # a server says that it does not accept a client's certificate after the handshake


def why_not_connected(kit: Path, patience: float = 0.0) -> str | None:
    """What is wrong between this kit and its server, and what to do; None if each accepts the other's certificate.

    A server that is not reached is tried for `patience` seconds. Raises SpecError for a folder that is no startup kit
    of a site.
    """
    server, client = _configuration(kit)
    startup = kit / "startup"
    host, port = _address(kit, server)
    authority = startup / str(client["ssl_root_cert"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # NVFlare compares names itself, with what the kit says
    try:
        context.load_verify_locations(authority)
        context.load_cert_chain(startup / str(client["ssl_cert"]), startup / str(client["ssl_private_key"]))
    except (OSError, ssl.SSLError) as error:
        return f"{startup}: its certificates cannot be read ({error}); get the startup kit anew"
    tried_until = time.monotonic() + patience
    while True:
        try:
            with socket.create_connection((host, port), _SECONDS) as plain:
                return _handshake(context, plain, f"{host}:{port}", kit)
        except OSError as error:
            if time.monotonic() >= tried_until:
                return f"the server at {host}:{port} is not reached ({error}): does it run, is its port reachable?"
            time.sleep(0.5)


def _handshake(context: ssl.SSLContext, plain: socket.socket, address: str, kit: Path) -> str | None:
    project = f"the startup kit {kit} (of {_project(context)})"
    try:
        with context.wrap_socket(plain) as secured:
            secured.settimeout(_SECONDS_TO_REFUSE)
            try:
                refused = "it closes the connection" if secured.recv(1) == b"" else None
            except TimeoutError:
                refused = None  # it waits for what this side says
    except ssl.SSLCertVerificationError as error:
        if error.verify_code == _EXPIRED:
            return f"the certificate of the server at {address} has expired; have the federation provisioned again"
        return (
            f"the server at {address} and {project} are not of the same federation: the server's certificate is not"
            f" signed by the kit's authority ({error.verify_message}); use the kit that was provisioned with this"
            " server, or correct the server's address in it"
        )
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            return f"what answers at {address} is no server of a federation; correct the server's address in {kit}"
        refused = error.reason or str(error)
    except ConnectionResetError:
        refused = "it resets the connection"
    if refused is None:
        return None
    return (
        f"the server at {address} does not accept the certificate of {project}: {refused}; the certificate has"
        " expired, or is of another federation; get a new kit from whoever provisioned the server"
    )


_EXPIRED = 10  # OpenSSL's X509_V_ERR_CERT_HAS_EXPIRED


def _configuration(kit: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kit says of its server, and of itself."""
    path = kit / "startup" / "fed_client.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        server, client = content["servers"][0], content["client"]
    except FileNotFoundError as error:
        raise SpecError(f"{kit}: has no startup/fed_client.json; expected the startup kit of a site") from error
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise SpecError(f"{path}: not the configuration of a site's startup kit: {error}") from error
    return server, client


def _address(kit: Path, server: dict[str, Any]) -> tuple[str, int]:
    target = str(server.get("service", {}).get("target", ""))
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise SpecError(f"{kit / 'startup' / 'fed_client.json'}: servers: target: {target!r} is no host:port")
    return host, int(port)


def _project(context: ssl.SSLContext) -> str:
    """The name of the authority that the context trusts, by which a project is known."""
    authorities: list[dict[str, Any]] = list(context.get_ca_certs())
    names = {key: value for one in authorities for part in one["subject"] for key, value in part}
    return f"project {names.get('commonName', '?')!r}"
