"""Files and settings that README and docs show are read as they stand there, by what reads those of users."""

import os
import re
import shutil
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from pydantic import BaseModel

from fedsft_assets.data.records import read_records
from fedsft_assets.data.sources.fetch import fetch
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.specs.yaml_file import Spec
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.documents import DOCUMENTS, Block, blocks
from fedsft_assets_tests.shipped import DATASETS

_FILE = re.compile(r"# ((?:datasets|jobs)/[\w-]+\.yaml)\n")
# A part of a file stands for that file with these fields in place of its own.
_WHOLE = {DatasetSpec: "datasets/oasst1.yaml", JobSpec: "jobs/fedavg.yaml"}
_NOT_OF_THE_PROJECT = ("HF_TOKEN", "DAGSTER_HOME", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
_TESTED_WITH_ITS_COMMANDS = "production.md"


def _all(language: str) -> list[Block]:
    return [block for document in DOCUMENTS for block in blocks(document, language)]


def _read(block: Block, folder: Path) -> DatasetSpec | JobSpec:
    """A dataset's or a job's file, or a part of one, read as a study reads it."""
    if file := _FILE.match(block.text):
        path, text = folder / file[1], block.text
    else:
        said = yaml.safe_load(block.text)
        (kind,) = (kind for kind in _WHOLE if said.keys() <= kind.model_fields.keys())
        path = folder / _WHOLE[kind]
        text = yaml.safe_dump({**yaml.safe_load((PROJECT / _WHOLE[kind]).read_text()), **said})
    path.parent.mkdir()
    path.write_text(text)
    return DatasetSpec.load(path) if path.parent.name == "datasets" else JobSpec.load(path, list(DATASETS))


def _says(spec: BaseModel, said: dict[str, Any]) -> bool:
    """Whether every field has the value that the block gives it."""
    for name, value in said.items():
        read = getattr(spec, name)
        if not (_says(read, value) if isinstance(read, Spec) and isinstance(value, dict) else read == value):
            return False
    return True


@pytest.mark.parametrize("block", _all("yaml"), ids=str)
def test_every_file_is_one_that_a_study_reads(block: Block, tmp_path: Path) -> None:
    spec = _read(block, tmp_path)
    said = yaml.safe_load(block.text)
    if not _FILE.match(block.text):
        assert _says(spec, said)


def test_the_job_on_the_page_is_the_one_that_is_shipped(tmp_path: Path) -> None:
    (block,) = (block for block in _all("yaml") if block.text.startswith("# jobs/fedavg.yaml\n"))
    assert block.page == "sites.md"
    assert _read(block, tmp_path) == JobSpec.load(PROJECT / "jobs/fedavg.yaml", list(DATASETS))


def test_rows_of_a_csv_file_become_records_by_the_dataset_file_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = (block for block in _all("yaml") if block.text.startswith("# datasets/support.yaml\n"))
    monkeypatch.setenv("HOME", str(tmp_path))
    rows = [f"How do I open box {number}?,model {number},Pull lid {number}." for number in range(40)]
    (tmp_path / "tickets.csv").write_text("\n".join(["question,product,answer", *rows]) + "\n")
    dataset = _read(block, tmp_path)
    assert isinstance(dataset, DatasetSpec)
    for folder in ("raw", "splits"):
        (tmp_path / folder).mkdir()
    fetch(dataset, "sample", into=tmp_path / "raw", downloads=tmp_path / "downloads")
    split_dataset(dataset, raw=tmp_path / "raw", into=tmp_path / "splits")
    records = [record for split in SPLITS for record in read_records(split_file(tmp_path / "splits", split))]
    assert len(records) == len(rows)


@pytest.mark.parametrize(
    "block", [block for block in _all("bash") if block.exports and block.page != _TESTED_WITH_ITS_COMMANDS], ids=str
)
def test_every_variable_that_is_exported_is_a_setting_with_that_value(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "\n".join((*block.exports, "env --null"))
    own = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    shell = ["bash", "-euo", "pipefail", "-c", script]
    printed = subprocess.run(shell, cwd=tmp_path, env=own, capture_output=True, text=True, check=True).stdout
    variables = dict(line.split("=", 1) for line in printed.split("\0") if line)
    exported = {name: variables[name] for line in block.exports for name in re.findall(r"\b([A-Z_]+)=", line)}
    for name in [name for name in os.environ if name.startswith(("FEDSFT_", "MLFLOW_TRACKING_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("FEDSFT_HOME", str(tmp_path / "home"))
    usual = Settings()
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    for name in exported.keys() - set(_NOT_OF_THE_PROJECT):
        assert _value(settings, name) != _value(usual, name), name


def _value(settings: Settings, variable: str) -> Any:
    if variable == "MLFLOW_TRACKING_URI":
        return settings.mlflow_uri
    value: Any = settings
    for name in variable.removeprefix("FEDSFT_").lower().split("__"):
        value = getattr(value, name)
    return value


@pytest.fixture
def certificate(tmp_path: Path) -> dict[str, str]:
    """A key and a certificate for it, by where the page has them."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedsft.example.org")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (tmp_path / "key").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))
    return {"/etc/nginx/fedsft.crt": f"{tmp_path}/crt", "/etc/nginx/fedsft.key": f"{tmp_path}/key"}


@pytest.mark.skipif(shutil.which("nginx") is None, reason="no nginx on this machine")
def test_nginx_takes_the_configuration_of_the_login(tmp_path: Path, certificate: dict[str, str]) -> None:
    token, server = (block.text for block in _all("nginx"))
    (tmp_path / "token.conf").write_text(token)
    (tmp_path / "htpasswd").touch()
    places = {
        **certificate,
        "/etc/nginx/fedsft-token.conf": f"{tmp_path}/token.conf",
        "/etc/nginx/fedsft.htpasswd": f"{tmp_path}/htpasswd",
        "listen 443 ": f"listen unix:{tmp_path}/socket ",  # the port may be taken, or not for this account
    }
    for written, here in places.items():
        assert written in server
        server = server.replace(written, here)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    own = " ".join(f"{kind}_temp_path {tmp_path}/{kind};" for kind in kinds)  # the machine's are for its own nginx
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}} http {{ access_log off; {own} {server} }}"
    )
    command = ["nginx", "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")]
    tested = subprocess.run(command, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stderr
