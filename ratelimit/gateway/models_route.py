"""The models that a key may use: ``GET /v1/models`` and ``/v1/models/{id}``, in OpenAI's form and in Anthropic's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ratelimit.gateway.dialects import Dialect

#: When the models were released is not known here.
_CREATED_AT = "1970-01-01T00:00:00Z"


def model_body(model: str, dialect: Dialect) -> dict[str, Any]:
    """One model."""
    if dialect == "anthropic":
        told = {"type": "model", "id": model, "display_name": model, "created_at": _CREATED_AT}
        return {**told, "lifecycle": "active"}
    return {"id": model, "object": "model", "created": 0, "owned_by": "penstock"}


def models_body(models: Sequence[str], dialect: Dialect) -> dict[str, Any]:
    """All of them, on one page."""
    data = [model_body(model, dialect) for model in models]
    if dialect == "anthropic":
        first, last = (models[0], models[-1]) if models else (None, None)
        return {"data": data, "has_more": False, "first_id": first, "last_id": last}
    return {"object": "list", "data": data}
