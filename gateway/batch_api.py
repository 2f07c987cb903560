"""``/v1/files`` and ``/v1/batches`` as OpenAI documents them, for the calling tenant's own."""

# No postponed annotations: FastAPI reads those of functions made inside a function.

import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from fastapi import APIRouter, FastAPI, File, Form, Query, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response, StreamingResponse

from llmserve.bus.base import BusError
from llmserve.gateway.batch_records import Batch, FileObject, Status, cancelling
from llmserve.gateway.batch_runner import BatchRunner
from llmserve.gateway.batch_store import BatchStore, NotFound, new_batch
from llmserve.gateway.caller import current_caller
from llmserve.gateway.errors import error_response

log = logging.getLogger(__name__)

T = TypeVar("T", FileObject, Batch)

_PIECE_BYTES = 256 << 10
_Id = Annotated[str, Field(max_length=128)]


class NewBatch(BaseModel):
    """Body of ``POST /v1/batches``."""

    model_config = ConfigDict(extra="ignore")

    input_file_id: _Id
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: (
        Annotated[
            dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
        ]
        | None
    ) = None


def install_batch_routes(app: FastAPI, store: BatchStore, runner: BatchRunner) -> None:
    """Add the routes."""
    router = APIRouter(tags=["batch"])

    @router.post("/v1/files")
    async def upload(file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()]) -> Response:
        if purpose != "batch":
            return _bad(f"purpose must be 'batch', not {purpose!r}", "purpose")
        name = (file.filename or "file.jsonl")[:255]
        try:
            return _answer(await store.add_file(_tenant(), name, purpose, _pieces(file)))
        except BusError as error:
            return _away(error)

    @router.get("/v1/files")
    async def list_files(
        purpose: str | None = None,
        limit: Annotated[int, Query(ge=1, le=10000)] = 10000,
        order: Literal["asc", "desc"] = "desc",
        after: _Id | None = None,
    ) -> Response:
        try:
            files = [file for file in await store.files(_tenant()) if purpose in (None, file.purpose)]
        except BusError as error:
            return _away(error)
        return _page(files if order == "desc" else files[::-1], after, limit)

    @router.get("/v1/files/{file_id}")
    async def show_file(file_id: str) -> Response:
        try:
            return _answer(await store.file(_tenant(), file_id))
        except NotFound:
            return _no_file(file_id)
        except BusError as error:
            return _away(error)

    @router.delete("/v1/files/{file_id}")
    async def remove_file(file_id: str) -> Response:
        try:
            await store.remove_file(_tenant(), file_id)
        except NotFound:
            return _no_file(file_id)
        except BusError as error:
            return _away(error)
        return _answer({"id": file_id, "object": "file", "deleted": True})

    @router.get("/v1/files/{file_id}/content")
    async def content(file_id: str) -> Response:
        tenant = _tenant()
        try:
            file = await store.file(tenant, file_id)
        except NotFound:
            return _no_file(file_id)
        except BusError as error:
            return _away(error)
        headers = {"content-length": str(file.bytes)}
        return StreamingResponse(store.content(tenant, file_id), 200, headers, "application/octet-stream")

    @router.post("/v1/batches")
    async def create(body: NewBatch) -> Response:
        tenant = _tenant()
        try:
            file = await store.file(tenant, body.input_file_id)
        except NotFound:
            return _bad(f"No such file: {body.input_file_id}", "input_file_id")
        except BusError as error:
            return _away(error)
        if file.purpose != "batch":
            return _bad(f"File {file.id} has the purpose {file.purpose!r}; it must be 'batch'", "input_file_id")
        batch = new_batch(file.id, body.endpoint, body.completion_window, body.metadata)
        try:
            await store.add_batch(tenant, batch)
        except BusError as error:
            return _away(error)
        runner.look()
        return _answer(batch)

    @router.get("/v1/batches")
    async def list_batches(limit: Annotated[int, Query(ge=1, le=100)] = 20, after: _Id | None = None) -> Response:
        try:
            return _page(await store.batches(_tenant()), after, limit)
        except BusError as error:
            return _away(error)

    @router.get("/v1/batches/{batch_id}")
    async def show_batch(batch_id: str) -> Response:
        try:
            return _answer(await store.batch(_tenant(), batch_id))
        except NotFound:
            return _no_batch(batch_id)
        except BusError as error:
            return _away(error)

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Response:
        tenant = _tenant()
        try:
            await store.batch(tenant, batch_id)
            batch = await store.change(tenant, batch_id, lambda known: cancelling(known, time.time()))
        except NotFound:
            return _no_batch(batch_id)
        except BusError as error:
            return _away(error)
        if batch.status is not Status.CANCELLING:
            return _bad(f"Batch {batch_id} is {batch.status}; it cannot be cancelled", None, 409)
        runner.look()
        return _answer(batch)

    app.include_router(router)


def _tenant() -> str:
    caller = current_caller.get()
    if caller is None:
        raise RuntimeError("a request without a caller: the gateway's middleware is missing")
    return caller.tenant


async def _pieces(file: UploadFile) -> AsyncIterator[bytes]:
    while piece := await file.read(_PIECE_BYTES):
        yield piece


def _answer(what: object) -> Response:
    return Response(msgspec.json.encode(what), 200, media_type="application/json")


def _page(items: Sequence[T], after: str | None, limit: int) -> Response:
    ids = [item.id for item in items]
    start = ids.index(after) + 1 if after in ids else 0
    page = items[start : start + limit]
    return _answer(
        {
            "object": "list",
            "data": page,
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": start + limit < len(items),
        }
    )


def _bad(message: str, param: str | None, status: int = 400) -> Response:
    return error_response(status, "BadRequestError" if status == 400 else "ConflictError", message, param)


def _no_file(file_id: str) -> Response:
    return error_response(404, "NotFoundError", f"No such File object: {file_id}", "id")


def _no_batch(batch_id: str) -> Response:
    return error_response(404, "NotFoundError", f"No batch found with id '{batch_id}'.")


def _away(error: BusError) -> Response:
    log.warning("files and batches cannot be reached: %s", error)
    message = f"The store is unavailable: {error}"
    return error_response(503, "ServiceUnavailableError", message, headers={"retry-after": "1"})
