"""Model and batch in, named arrays out."""
