"""Every command of docs/production.md, in its order, in an empty folder, on this machine.

Only installing is done another way: environments with the packages of the extras take a second to link. The shell has
a umask that lets everybody read, and has exported secrets.
"""

import os
import re
import subprocess
import uuid
from pathlib import Path

import pytest

from fedsft_assets.federation.runtimes.processes import MARK, stop_marked
from fedsft_assets.settings import PROJECT
from fedsft_assets_tests.environments import environment_of, installing
from fedsft_assets_tests.watched import PLANTED, open_to_others, watching

pytestmark = pytest.mark.slow

DOCUMENT = PROJECT / "docs" / "production.md"
CHECKOUT = "export FEDSFT=~/fedsft"
INSTALLS = {
    "server-python": 'server-python/bin/pip install --constraint $FEDSFT/requirements.txt "$FEDSFT[server]"',
    "site-python": 'site-python/bin/pip install --constraint $FEDSFT/requirements.txt "$FEDSFT[site,data]"',
}
SETUP = "make -C $FEDSFT setup"
FIRST_SITE = "SITE=site-1 DATASET=alpaca"
OTHER_SITES = ("SITE=site-2 DATASET=dolly", "SITE=site-3 DATASET=oasst1")


def _blocks(section: str) -> list[str]:
    return re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def _script() -> str:
    """All commands; those of the section about a site for each of the three."""
    sections = re.split(r"^(?=## )", DOCUMENT.read_text(), flags=re.MULTILINE)
    commands: list[str] = []
    for section in sections:
        if section.startswith("## 4. A site"):
            assert all(f"`{said}`" in section for said in (FIRST_SITE, *OTHER_SITES))
            once = "\n".join(_blocks(section))
            assert once.startswith(FIRST_SITE)
            commands += [once, *(once.replace(FIRST_SITE, said) for said in OTHER_SITES)]
        else:
            commands += _blocks(section)
    script = "\n".join(commands)
    for said in (CHECKOUT, SETUP, *INSTALLS.values(), *(f"python3.11 -m venv {name}" for name in INSTALLS)):
        assert said in script
    lines = script.splitlines()
    kept = [line for line in lines if line not in (SETUP, *INSTALLS.values()) and "-m venv" not in line]
    return "\n".join(kept).replace(CHECKOUT, f"export FEDSFT={PROJECT}")


@pytest.mark.long
def test_a_federation_set_up_by_the_document_to_the_letter_trains_a_checkpoint(tmp_path: Path) -> None:
    for extras, name in ((["server"], "server-python"), (["site", "data"], "site-python")):
        environment_of(installing(*extras), tmp_path / name)
    home = tmp_path / "empty_home"
    home.mkdir()
    mark = f"document {uuid.uuid4().hex}"
    # What a developer's shell may have set is not in the document.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEDSFT_", "PYTHON", "DAGSTER_"))}
    try:
        with watching(lambda environment: environment.get(MARK) == mark) as seen:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", _script()],
                cwd=tmp_path,
                env={**kept, **PLANTED, "HOME": str(home), MARK: mark},
                umask=0,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
    finally:
        stop_marked(mark)
    assert done.returncode == 0, done.stdout[-6000:]
    assert (tmp_path / "study/checkpoints/fedavg/current/model.nemo").is_file()
    for site in ("site-1", "site-2", "site-3"):
        jobs = list((tmp_path / site).glob("*-*-*-*-*/app_*/config/plan.json"))
        assert len(jobs) == 1, f"{site} ran {len(jobs)} jobs"
    for place in ("kits", "server", "site-1", "site-2", "site-3", "study", "admin"):
        assert open_to_others(tmp_path / place) == []
    for program in ("nvflare.private.fed.app.client.worker_process", "fedsft_assets.federation.site.process"):
        at_sites = seen.of(program)
        assert len(at_sites) >= 3
        assert not [name for environment in at_sites for name in environment.keys() & PLANTED.keys()]
