"""A long run of random faults: `python -m fedsft_assets_tests.faults --faults 200 --seed 1`."""

import argparse
import logging
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedsft_assets.settings import Settings
from fedsft_assets_tests.faults.campaign import VARIANTS, Campaign, prepared_copy
from fedsft_assets_tests.faults.faults import PLACES, Kind, Target
from fedsft_assets_tests.faults.outcome import Outcome
from fedsft_assets_tests.prepared import prepare_home

_SHARES = {"production": 0.35, "poc": 0.35, "simulator": 0.3}  # the longest first
_AT_ONCE = 2


def main() -> None:
    args = _arguments()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    counts = {runtime: round(args.faults * share) for runtime, share in _SHARES.items()}
    counts["production"] += args.faults - sum(counts.values())
    if args.runtime:
        counts = {args.runtime: args.faults}
    logging.getLogger().addHandler(logging.NullHandler())  # else Python prints what NVFlare's client warns of
    home = Settings().home
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="faults-") as folder, ThreadPoolExecutor(_AT_ONCE) as threads:
        prepared = prepare_home(Path(folder) / "prepared").home
        campaigns = {}
        for runtime in counts:
            own = prepared_copy(prepared, Path(folder) / runtime)
            campaigns[runtime] = Campaign(own, runtime, args.seed, _say, args.target, args.kind, args.variant)
        running = [
            threads.submit(campaign.run, counts[runtime], args.execution) for runtime, campaign in campaigns.items()
        ]
        stopped = False
        try:
            for one in running:
                one.result()
        except BaseException as error:
            for campaign in campaigns.values():
                campaign.stop()
            if not isinstance(error, KeyboardInterrupt):
                raise
            stopped = True
            _say("stopped early; the last executions are not judged")
    outcome = Outcome()
    for campaign in campaigns.values():
        outcome.add(campaign.outcome)
    _say("\n".join(["", *outcome.wrong, "", outcome.table]))
    sys.exit(1 if outcome.wrong or stopped else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Disturb running jobs at random moments, and compare what they give.")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runtime", choices=sorted(PLACES), help="all if not given, two side by side")
    parser.add_argument("--target", choices=[str(target) for target in Target], help="hit nothing else")
    parser.add_argument("--kind", choices=[str(kind) for kind in Kind], help="do nothing else")
    parser.add_argument("--variant", choices=list(VARIANTS), help="execute no other job")
    parser.add_argument("--execution", type=int, help="do the execution of this number alone, with --runtime")
    args = parser.parse_args()
    if args.execution and not args.runtime:
        parser.error("--execution needs --runtime")
    for runtime in [args.runtime] if args.runtime else PLACES:
        try:
            PLACES[runtime].only(args.target, args.kind)
        except ValueError as error:
            parser.error(f"{runtime}: {error}; choose another --runtime")
    return args


def _say(text: str) -> None:
    print(text, file=sys.__stdout__, flush=True)  # elsewhere, NVFlare is kept from printing


if __name__ == "__main__":
    main()
