"""One file a command of `sonify`. Module level stays light: `sonify --help` must answer at once."""
