"""Steps in plain Python: read, compute signals, prune, write, report. No Prefect, no server."""
