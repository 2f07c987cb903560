"""Files and batches as OpenAI's API has them, and how a batch moves from one status to the next. Pure."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Generic, TypeVar

import msgspec
from msgspec.structs import replace

WINDOW = "24h"
WINDOW_S = 86400
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MAX_LINES = 50_000
MAX_ERRORS = 100
"""Errors of a file's validation that are told."""

Body = TypeVar("Body")
"""Of a response: ``msgspec.Raw`` where it is only passed on."""


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "file"
    bytes: int
    created_at: int
    """Unix time in seconds, as all times here."""
    expires_at: int
    filename: str
    purpose: str
    status: str = "processed"


class Status(StrEnum):
    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


ENDED = frozenset({Status.FAILED, Status.COMPLETED, Status.EXPIRED, Status.CANCELLED})


class Counts(msgspec.Struct, frozen=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct, frozen=True):
    code: str
    message: str
    param: str | None = None
    line: int | None = None


class BatchErrors(msgspec.Struct, frozen=True):
    data: list[BatchError]
    object: str = "list"


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str
    status: Status = Status.VALIDATING
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = Counts()
    metadata: dict[str, str] | None = None

    @property
    def ended(self) -> bool:
        return self.status in ENDED


class Line(msgspec.Struct, frozen=True):
    """One request of an input file."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw


class LineResponse(msgspec.Struct, Generic[Body], frozen=True):
    status_code: int
    request_id: str
    body: Body


class LineError(msgspec.Struct, frozen=True):
    code: str
    message: str


class LineResult(msgspec.Struct, Generic[Body], frozen=True):
    """One line of an output or error file, or what a direct publisher gets."""

    id: str
    custom_id: str | None
    response: LineResponse[Body] | None = None
    error: LineError | None = None

    @property
    def succeeded(self) -> bool:
        return self.response is not None and self.response.status_code == 200


class InvalidLine(ValueError):
    """A line that is no request; ``code`` is OpenAI's word for what is wrong."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


_lines = msgspec.json.Decoder(Line)


def parse_line(text: bytes, endpoint: str) -> Line:
    """Raises ``InvalidLine``."""
    try:
        line = _lines.decode(text)
    except msgspec.ValidationError as error:
        raise InvalidLine("missing_required_parameter", f"This line is no request: {error}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidLine("invalid_json_line", "This line is not parseable as valid JSON.") from error
    if line.method != "POST":
        raise InvalidLine("invalid_method", f"The method must be POST, not {line.method!r}.", "method")
    if line.url != endpoint:
        message = f"The URL {line.url!r} does not match the batch's endpoint {endpoint!r}."
        raise InvalidLine("mismatched_endpoint", message, "url")
    if not line.custom_id:
        raise InvalidLine("missing_required_parameter", "custom_id must not be empty.", "custom_id")
    if bytes(line.body)[:1] != b"{":
        raise InvalidLine("invalid_request", "The body must be an object.", "body")
    return line


def begun(batch: Batch, total: int, now: float) -> Batch:
    """Its file is valid: its requests run."""
    if batch.status is not Status.VALIDATING:
        return replace(batch, request_counts=replace(batch.request_counts, total=total))
    counts = replace(batch.request_counts, total=total)
    return replace(batch, status=Status.IN_PROGRESS, in_progress_at=math.floor(now), request_counts=counts)


def rejected(batch: Batch, errors: list[BatchError], now: float) -> Batch:
    """Its file is not valid."""
    if batch.ended:
        return batch
    found = BatchErrors(errors[:MAX_ERRORS])
    return replace(batch, status=Status.FAILED, failed_at=math.floor(now), errors=found)


def cancelling(batch: Batch, now: float) -> Batch:
    """The caller wants no more of it."""
    if batch.ended or batch.status in (Status.CANCELLING, Status.FINALIZING):
        return batch
    return replace(batch, status=Status.CANCELLING, cancelling_at=math.floor(now))


def finalizing(batch: Batch, now: float) -> Batch:
    """Every request has its result: the files are being written."""
    if batch.status is not Status.IN_PROGRESS:
        return batch
    return replace(batch, status=Status.FINALIZING, finalizing_at=math.floor(now))


def counted(batch: Batch, completed: int, failed: int) -> Batch:
    return replace(batch, request_counts=replace(batch.request_counts, completed=completed, failed=failed))


def finished(batch: Batch, output: str | None, errors: str | None, now: float, *, expired: bool) -> Batch:
    """The files are there."""
    if batch.ended:
        return batch
    at = math.floor(now)
    batch = replace(batch, output_file_id=output, error_file_id=errors)
    if batch.status is Status.CANCELLING:
        return replace(batch, status=Status.CANCELLED, cancelled_at=at)
    if expired:
        return replace(batch, status=Status.EXPIRED, expired_at=at)
    return replace(batch, status=Status.COMPLETED, completed_at=at)
