"""Recipes as Prefect flows: the same steps, with retries, artifacts and schedules."""
