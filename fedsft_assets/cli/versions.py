"""The commands `fedsft accept` and `fedsft prune`: accept rejected data, and remove unneeded versions."""

import argparse
import getpass
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from fedsft_assets.credentials import redact
from fedsft_assets.prune import LAST_CHECKPOINTS
from fedsft_assets.settings import Settings
from fedsft_assets.specs.limits import CheckName
from fedsft_assets.store import Store
from fedsft_assets.tracking import Outbox, Tracking
from fedsft_assets.versions import NoVersionError, accept


def add_commands(commands: Any) -> None:
    """Add both to the subcommands of `fedsft`."""
    take = commands.add_parser("accept", help="use data that failed its checks")
    take.add_argument("dataset", help="a dataset, or 'combined'")
    take.add_argument(
        "checks", nargs="+", choices=get_args(CheckName), metavar="check", help="every check that it failed"
    )
    prune = commands.add_parser("prune", help="list, then remove, versions that are no longer needed")
    prune.add_argument("--yes", action="store_true", help="do not ask")
    prune.add_argument("--dry-run", action="store_true", help="list only")
    prune.add_argument(
        "--keep", type=int, default=LAST_CHECKPOINTS, help="checkpoints of each job to keep, the newest (%(default)s)"
    )


def run_accept(args: argparse.Namespace, settings: Settings) -> None:
    store = settings.store
    try:
        version = accept(store.splits(args.dataset), args.checks, f"{getpass.getuser()}, by fedsft accept")
    except NoVersionError as error:
        sys.exit(str(error))
    print(f"{version}: is now current; accepted despite {', '.join(args.checks)}")


def run_prune(args: argparse.Namespace, settings: Settings) -> None:
    from fedsft_assets.cli.study import prepare_instance
    from fedsft_assets.defs.run import versions_in_use
    from fedsft_assets.prune import remove, unneeded

    if args.keep < 0:
        sys.exit(f"--keep: {args.keep} checkpoints cannot be kept; expected 0 or more")
    prepare_instance(settings)
    try:
        registered = list(_registered(settings.store, Tracking.of(settings)))
    except Exception as error:  # MLflow may raise anything
        sys.exit(f"nothing removed, since MLflow did not return the registered versions: {redact(str(error))}")
    found = unneeded(settings.store, registered, versions_in_use(settings.store), args.keep)
    for one in found:
        print(f"{_size(one.bytes):>10}  {one.path.relative_to(settings.home)}")
    total = _size(sum(one.bytes for one in found))
    print(f"{total:>10}  in {len(found)} unneeded versions and workspaces")
    if not found or args.dry_run:
        return
    if not args.yes:
        if not sys.stdin.isatty():
            sys.exit("nothing removed; use --yes to remove them")
        if input("remove them? [y/N] ").strip().lower() not in ("y", "yes"):
            return
    removed = remove(found)
    print(f"removed {len(removed)}, {_size(sum(one.bytes for one in removed))}")


def _registered(store: Store, tracking: Tracking) -> Iterator[Path]:
    """Checkpoints that are registered as model versions, or are pending registration."""
    client, token = tracking.client(), None
    while True:
        page = client.search_model_versions(page_token=token)
        for version in page:
            if archive := version.tags.get("archive"):
                yield _here(store, Path(archive))
        token = page.token
        if not token:
            break
    outbox = Outbox(store.outbox)
    for entry in map(outbox.get, outbox.entries()):
        if entry and entry.ending.registration:
            yield _here(store, Path(entry.ending.registration.archive))


def _here(store: Store, archive: Path) -> Path:
    """The checkpoint's version in this home, even if the home was moved since it was registered."""
    digest, job = archive.parent.name, archive.parent.parent.name
    return store.checkpoint(job) / digest


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
