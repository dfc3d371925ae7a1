"""The HTTP service and its page (FastAPI lives here alone)."""
