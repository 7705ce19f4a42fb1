"""Commands of `sonify`, one file each. Heavy packages are imported inside the commands, so that `--help` is fast."""
