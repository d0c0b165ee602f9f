"""Diagnoses of a connection that need no federation; the others are in end_to_end."""

import json
import socket
import threading
from pathlib import Path

import pytest

from fedsft_assets.federation.connections.startup_kit import diagnose_connection
from fedsft_assets.specs.yaml_file import SpecError
from fedsft_assets_tests.provisioned import provision
from fedsft_assets_tests.tracking.server import unused_port


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provision(tmp_path_factory.mktemp("federation"), ["site-1"]).sites["site-1"]


def _at(kit: Path, target: str) -> Path:
    """The kit, with the server's address changed."""
    path = kit / "startup" / "fed_client.json"
    content = json.loads(path.read_text())
    content["servers"][0]["service"]["target"] = target
    path.write_text(json.dumps(content))
    return kit


def test_unreachable_server_is_named_with_its_address(kit: Path) -> None:
    port = unused_port()
    problem = diagnose_connection(_at(kit, f"localhost:{port}"))
    assert problem is not None
    assert problem.startswith(f"cannot reach the server at localhost:{port} (")


def test_unreachable_server_is_retried(kit: Path) -> None:
    with socket.socket() as listener:
        port = unused_port()
        timer = threading.Timer(0.7, lambda: (listener.bind(("127.0.0.1", port)), listener.listen()))
        timer.start()
        answer = threading.Thread(target=lambda: (timer.join(), listener.accept()[0].sendall(b"220 mail\r\n" * 99)))
        answer.start()
        problem = diagnose_connection(_at(kit, f"127.0.0.1:{port}"), patience=60)
        answer.join()
    assert (
        problem
        == f"127.0.0.1:{port} does not speak TLS: it is not the server of a federation; correct the address in {kit}"
    )


def test_invalid_address_and_a_folder_that_is_not_a_kit_are_errors(kit: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"fed_client\.json: servers: target: expected host:port, found 'localhost'"):
        diagnose_connection(_at(kit, "localhost"))
    with pytest.raises(SpecError, match=r"startup/fed_client\.json is missing; expected the startup kit of a site"):
        diagnose_connection(tmp_path)
