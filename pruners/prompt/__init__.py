"""Pruning of the prompt search space."""
