"""The command `fedsft-server`: configure the startup kit of the federation's server."""

import argparse
import sys
from pathlib import Path

from fedsft_assets.access import close_kit
from fedsft_assets.federation.kit_policy import keep_server_files, read_resources, write_server_policy


def configure_server(kit: Path) -> list[Path]:
    """Allow the study's jobs to run the installed controller, and store their files in the kit.

    Returns the written files. Raises ValueError if the folder is not the startup kit of a server.
    """
    if not (kit / "startup" / "fed_server.json").is_file():
        raise ValueError(f"{kit}: startup/fed_server.json is missing; expected the startup kit of a server")
    resources = read_resources(kit)
    keep_server_files(resources, kit.resolve() / "storage")
    return write_server_policy(kit, resources)


def main() -> None:
    parser = argparse.ArgumentParser(prog="fedsft-server", description="The startup kit of the federation's server.")
    commands = parser.add_subparsers(dest="command", required=True)
    configure = commands.add_parser("configure", help="write this server's policy into its startup kit")
    configure.add_argument("kit", type=Path, help="the folder that contains startup/fed_server.json")
    try:
        kit = parser.parse_args().kit
        for path in configure_server(kit):
            print(f"wrote {path}")
        if warning := close_kit(kit):
            print(warning)
    except (ValueError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
