"""Parquet tables, FAISS indexes and their manifests."""
