"""The description of a server in OpenAPI 3.1, put together from what each protocol says of each model."""

from __future__ import annotations

from dlopt.serve.exchange import Json, product_version
from dlopt.serve.models.registry import Models
from dlopt.serve.protocols import DIALECTS


def document(models: Models) -> Json:
    """All paths of all models, which exist only as long as they are served."""
    paths: Json = {}
    for model in models:
        for dialect in DIALECTS:
            paths |= dialect.describe(model)
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": " and ".join(models.names()) or "dlopt", "version": product_version(), "description": "Served by dlopt."},
        "servers": [{"url": "."}],
        "paths": paths,
        "security": [{}, {"bearer": []}, {"header": []}],
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
            "responses": {"Error": {"description": "What is wrong", "content": {"application/json": {"schema": error}}}},
        },
    }
