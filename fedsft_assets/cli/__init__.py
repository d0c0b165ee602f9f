"""Commands, one file each: `fedsft`, `fedsft-generate`, `fedsft-site` and `fedsft-server`."""
