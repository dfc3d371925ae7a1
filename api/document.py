"""The OpenAPI document, with errors as they are really worded at each route."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

ERRORS: dict[str, dict[str, Any]] = {
    "": {
        "title": "Error",
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["type", "message", "details"],
                "properties": {
                    "type": {"type": "string"},
                    "message": {"type": "string"},
                    "details": {"type": "array", "items": {"type": "object"}},
                },
            }
        },
    },
    "/rerank": {
        "title": "TextEmbeddingsInferenceError",
        "type": "object",
        "required": ["error", "error_type"],
        "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
    },
    "/v1/rerank": {
        "title": "JinaError",
        "type": "object",
        "required": ["detail", "errors"],
        "properties": {
            "detail": {"type": "string"},
            "errors": {"type": "array", "items": {"type": "object"}},
        },
    },
    "/v2/rerank": {
        "title": "CohereError",
        "type": "object",
        "required": ["id", "message"],
        "properties": {"id": {"type": "string"}, "message": {"type": "string"}},
    },
}
"""Schemas of error bodies by path; that of "" holds everywhere else (`errors.body_of`)."""

_FRAMEWORKS = "#/components/schemas/HTTPValidationError"


def tell_errors(app: FastAPI) -> None:
    """Let an application's document say what `security` really answers.

    FastAPI describes a body of its own for 422; every error here has its dialect's. It stands as
    the `default` answer of each operation, and in place of FastAPI's.
    """
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            for path, operations in document.get("paths", {}).items():
                for operation in operations.values():
                    _tell(operation["responses"], path)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas.update({schema["title"]: schema for schema in ERRORS.values()})
        found: dict[str, Any] = app.openapi_schema or {}
        return found

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way


def _tell(responses: dict[str, Any], path: str) -> None:
    title = ERRORS.get(path, ERRORS[""])["title"]
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{title}"}}}
    for response in responses.values():
        found = response.get("content", {}).get("application/json", {}).get("schema", {})
        if found.get("$ref") == _FRAMEWORKS:
            response["content"] = content
    responses.setdefault("default", {"description": "Why there is no result.", "content": content})
