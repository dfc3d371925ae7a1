"""Recipes: which steps, in which order, with which options."""
