"""The command `fedsft-server`: what the federation's server allows, written into its startup kit."""

import argparse
import sys
from pathlib import Path

from fedsft_assets.access import close_kit
from fedsft_assets.federation.kit_policy import keep_server_files, read_resources, write_server_policy


def configure_server(kit: Path) -> list[Path]:
    """Let the study's jobs run with the server's part that is installed here, and keep their files in the kit.

    Returns the files that were written. Raises ValueError if the folder is no kit of a server.
    """
    if not (kit / "startup" / "fed_server.json").is_file():
        raise ValueError(f"{kit}: has no startup/fed_server.json; expected the startup kit of a server")
    resources = read_resources(kit)
    keep_server_files(resources, kit.resolve() / "storage")
    return write_server_policy(kit, resources)


def main() -> None:
    parser = argparse.ArgumentParser(prog="fedsft-server", description="The startup kit of the federation's server.")
    commands = parser.add_subparsers(dest="command", required=True)
    configure = commands.add_parser("configure", help="write what this server allows into its startup kit")
    configure.add_argument("kit", type=Path, help="the folder that has startup/fed_server.json")
    try:
        kit = parser.parse_args().kit
        for path in configure_server(kit):
            print(f"wrote {path}")
        if said := close_kit(kit):
            print(said)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
