"""A long run of random kills: `python -m fedsft_assets_tests.faults --kills 200 --seed 1`."""

import argparse
import sys
import tempfile
from pathlib import Path

from fedsft_assets.settings import Settings
from fedsft_assets_tests.faults.campaign import run_campaign
from fedsft_assets_tests.prepared import prepare_home


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill processes of running jobs at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    home = Settings().home
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix="faults-") as folder:
        outcome = run_campaign(prepare_home(Path(folder)), args.seed, args.kills, lambda text: print(text, flush=True))
    for wrong in outcome.wrong:
        print(wrong)
    print(f"hit: {', '.join(f'{victim} {count}' for victim, count in sorted(outcome.victims.items()))}")
    print(f"injected {outcome.injected}, recovered {outcome.recovered}, wrong {len(outcome.wrong)}")
    sys.exit(1 if outcome.wrong else 0)


if __name__ == "__main__":
    main()
