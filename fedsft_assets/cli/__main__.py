"""`python -m fedsft_assets.cli` is the command `fedsft`."""

from fedsft_assets.cli.main import main

main()
