"""Networks of our own and how their weights are loaded: the only I/O under pruners/."""
