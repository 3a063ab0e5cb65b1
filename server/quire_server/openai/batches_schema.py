"""What a batch is asked for with."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from quire_server.openai.base import Strict
from quire_server.openai.fields import Metadata

Id = Annotated[str, StringConstraints(min_length=1, max_length=64)]
KeptSeconds = Annotated[int, Field(ge=3600, le=2_592_000, description="From an hour to 30 days.")]


class ExpiresAfter(Strict):
    anchor: Literal["created_at"]
    seconds: KeptSeconds


class BatchRequest(Strict):
    input_file_id: Id
    endpoint: Annotated[str, StringConstraints(max_length=64)]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = Field(None, description="How long the files that it makes are kept.")


class Query(BaseModel):
    """What stands behind the question mark: unknown names are refused there too."""

    model_config = ConfigDict(extra="forbid")


class BatchList(Query):
    limit: Annotated[int, Field(ge=1, le=100)] = 20
    after: Id | None = None


class FileList(Query):
    limit: Annotated[int, Field(ge=1, le=10_000)] = 10_000
    after: Id | None = None
    order: Literal["asc", "desc"] = "desc"
    purpose: Annotated[str, StringConstraints(max_length=64)] | None = None


def page(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list as the API shows it, of ``limit`` + 1 items where there are more."""
    shown = items[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > limit,
    }
