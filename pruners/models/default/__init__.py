"""The shipped default: adapter and heads of a small Provence, and its model card."""
