"""Pruning of retrieved contexts: the sentences and passages a model reads."""
