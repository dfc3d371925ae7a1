"""The service to compare with: FastAPI around sentence-transformers' CrossEncoder, nothing more.

    python benchmarks/service_plain.py MODEL_FOLDER PORT

What one writes in ten minutes: a route in a plain function, so that FastAPI runs it in its pool
of threads, and `predict` with the library's own sorting and batches of 32.
"""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder


class Request(BaseModel):
    """A question and its passages."""

    query: str
    texts: list[str]


def main() -> None:
    """Serve until stopped."""
    model = CrossEncoder(sys.argv[1], device="cpu", max_length=512, local_files_only=True)
    app = FastAPI()

    @app.post("/rerank")
    def rerank(request: Request) -> list[dict[str, float]]:
        scores = model.predict([(request.query, text) for text in request.texts])
        ranked = sorted(enumerate(scores.tolist()), key=lambda one: -one[1])
        return [{"index": index, "score": score} for index, score in ranked]

    @app.get("/readyz")
    def ready() -> str:
        return "ok"

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")


if __name__ == "__main__":
    main()
