"""A long run of random kills: `python -m fedsft_assets_tests.faults --kills 200 --seed 1`."""

import argparse
import shutil
import signal
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedsft_assets.settings import Settings
from fedsft_assets.store import Store
from fedsft_assets_tests.faults.campaign import VARIANTS, Campaign, Outcome
from fedsft_assets_tests.prepared import prepare_home

_SHARE_OF_THE_POC = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill processes of running jobs at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runtime", choices=("simulator", "poc"), help="both if not given, side by side")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    in_poc = round(args.kills * _SHARE_OF_THE_POC)
    kills = {args.runtime: args.kills} if args.runtime else {"simulator": args.kills - in_poc, "poc": in_poc}
    home = Settings().home
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="faults-") as folder, ThreadPoolExecutor() as threads:
        prepared = prepare_home(Path(folder) / "prepared").home
        campaigns = []
        for runtime in kills:
            own = Store(shutil.copytree(prepared, Path(folder) / runtime))
            campaigns.append(Campaign(own, runtime, args.seed, lambda text: print(text, flush=True)))
        running = [
            threads.submit(campaign.run, count, list(VARIANTS))
            for campaign, count in zip(campaigns, kills.values(), strict=True)
        ]
        stopped = False
        try:
            for one in running:
                one.result()
        except BaseException as error:
            for campaign in campaigns:
                campaign.stop()
            if not isinstance(error, KeyboardInterrupt):
                raise
            stopped = True
            print("stopped early; what was injected into the last executions is not recovered yet")
    outcome = Outcome()
    for campaign in campaigns:
        outcome.add(campaign.outcome)
    print(f"hit: {', '.join(f'{victim} {count}' for victim, count in sorted(outcome.victims.items()))}")
    print(f"injected {outcome.injected}, recovered {outcome.recovered}, wrong {len(outcome.wrong)}")
    sys.exit(1 if outcome.wrong or stopped else 0)


if __name__ == "__main__":
    main()
