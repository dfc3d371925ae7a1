"""Pruning of a model's weights, heads, layers and experts."""
