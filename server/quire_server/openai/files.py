"""/v1/files: what batches read, and what they write."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.responses import FileResponse, Response

from quire_server.auth import owner_of
from quire_server.batch_runner import Batches
from quire_server.errors import ApiError, json_response, refuse
from quire_server.openai.batches_schema import FileList, KeptSeconds, page
from quire_server.state import server_of

router = APIRouter(prefix="/v1/files", tags=["files"])
UPLOADS_AT_ONCE = 8
FORM_FIELDS = frozenset({"file", "purpose", "expires_after[anchor]", "expires_after[seconds]"})
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"const": "batch"},
        "expires_after[anchor]": {"const": "created_at"},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}


async def batches_of(request: Request) -> Batches:
    return (await server_of(request)).batches


async def asking(request: Request) -> str | None:
    return owner_of(request)


Shared = Annotated[Batches, Depends(batches_of)]
Owner = Annotated[str | None, Depends(asking)]


@router.post(
    "", openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": FORM}}, "required": True}}
)
async def upload(request: Request, batches: Shared, owner: Owner) -> Response:
    """Keep a file: a form with ``file`` and ``purpose``. It goes to the disk as it comes."""
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(415, "the body must be a form: Content-Type: multipart/form-data", code="not_a_form")
    store = batches.store
    length = request.headers.get("content-length", "")
    await asyncio.to_thread(store.check_room, int(length[:20]) if length.isdecimal() else 0)
    if batches.uploads >= UPLOADS_AT_ONCE:
        message = f"{UPLOADS_AT_ONCE} uploads are under way already"
        raise ApiError(429, message, code="too_many", headers={"Retry-After": "1"})
    batches.uploads += 1
    try:
        async with request.form(max_files=1, max_fields=8, max_part_size=4096) as form:
            file, seconds = _checked(form, batches.settings.max_file_bytes)
            name, size = (file.filename or "file")[:255], file.size or 0
            return json_response(
                await asyncio.to_thread(store.add_file, file.file, size, owner, name, "batch", seconds)
            )
    finally:
        batches.uploads -= 1


def _checked(form: FormData, max_bytes: int) -> tuple[UploadFile, int | None]:
    """The file of an upload, and for how many seconds it is to be kept."""
    for name in form:
        if name not in FORM_FIELDS:
            raise refuse(name[:64], f"{name[:64]}: unrecognized request argument", "unknown_parameter")
    file, purpose = form.get("file"), form.get("purpose")
    if not isinstance(file, UploadFile):
        raise refuse("file", "missing required parameter: file", "missing_required_parameter")
    if purpose != "batch":
        if purpose is None:
            raise refuse("purpose", "missing required parameter: purpose", "missing_required_parameter")
        message = f"purpose: {str(purpose)[:64]!r} is not offered by this server, only 'batch'"
        raise refuse("purpose", message, "unsupported_value")
    if (file.size or 0) > max_bytes:
        raise too_large(max_bytes)
    if not file.size:
        raise refuse("file", "file: it is empty")
    return file, _kept(form.get("expires_after[anchor]"), form.get("expires_after[seconds]"))


def _kept(anchor: Any, seconds: Any) -> int | None:
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise refuse("expires_after[anchor]", "expires_after[anchor]: must be 'created_at'")
    try:
        return TypeAdapter(KeptSeconds).validate_python(seconds)
    except ValidationError as error:
        raise refuse("expires_after[seconds]", f"expires_after[seconds]: {error.errors()[0]['msg']}") from None


def too_large(max_bytes: int) -> ApiError:
    message = f"the file is larger than this server's limit of {max_bytes} bytes (--max-file-bytes)"
    return ApiError(413, message, param="file", code="file_too_large")


@router.get("")
async def list_files(batches: Shared, owner: Owner, query: Annotated[FileList, Query()]) -> Response:
    store = batches.store
    if query.after is not None:
        await _known(batches, query.after, owner, "after")
    files = await asyncio.to_thread(store.files, owner, query.purpose, query.limit + 1, query.after, query.order)
    return json_response(page(files, query.limit))


@router.get("/{file_id}")
async def retrieve(batches: Shared, owner: Owner, file_id: str) -> Response:
    return json_response(await _known(batches, file_id, owner))


@router.get("/{file_id}/content")
async def content(batches: Shared, owner: Owner, file_id: str) -> Response:
    file = await _known(batches, file_id, owner)
    headers = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(batches.store.path(file["id"]), headers=headers, media_type="application/octet-stream")


@router.delete("/{file_id}")
async def delete(batches: Shared, owner: Owner, file_id: str) -> Response:
    file = await _known(batches, file_id, owner)
    await asyncio.to_thread(batches.store.delete_file, file["id"])
    return json_response({"id": file["id"], "object": "file", "deleted": True})


async def _known(batches: Batches, file_id: str, owner: str | None, param: str = "file_id") -> dict[str, Any]:
    file = await asyncio.to_thread(batches.store.file, file_id, owner)
    if file is None:
        raise ApiError(404, f"no such file: {file_id[:64]!r}", param=param, code="file_not_found")
    return file
