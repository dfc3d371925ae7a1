"""The compression stage: a model and a pruned table in, a smaller model out."""
