"""Pruning of training sets: whole rows."""
