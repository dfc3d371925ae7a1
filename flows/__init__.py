"""Prefect flows, tasks and deployments over the pipeline steps (Prefect lives here alone)."""
