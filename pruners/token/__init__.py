"""Pruning of training tokens inside kept rows."""
