"""vLLM's ``EngineCoreClient`` on the bus: the seam below ``AsyncLLM``, above it everything is vLLM's."""

from __future__ import annotations

import asyncio
import copy
import time
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.detokenizer import IncrementalDetokenizer
from vllm.v1.serial_utils import MsgpackEncoder

from llmserve.bus.base import Bus, BusUnavailable, QueueFull
from llmserve.bus.cache_salt import CacheSalts, request_salt
from llmserve.gateway.attempts import Fail
from llmserve.gateway.call import Arrival, Call
from llmserve.gateway.caller import Caller, Failure, current_caller
from llmserve.gateway.channel import Channel
from llmserve.gateway.codec import Refusal
from llmserve.gateway.generation import current_stream
from llmserve.gateway.limits import LimitExceeded, Reservation
from llmserve.gateway.metrics import GatewayMetrics
from llmserve.gateway.vllm_codec import VllmOutputs, VllmRequestCodec, refuse_unsupported

if TYPE_CHECKING:
    from vllm.v1.engine.output_processor import OutputProcessor

    from llmserve.gateway.text_stream import TextStream

_RETRY_AFTER_S = 1
_FAILURES = {
    "unservable": (HTTPStatus.BAD_REQUEST, "BadRequestError"),
    "deadline": (HTTPStatus.GATEWAY_TIMEOUT, "TimeoutError"),
    "overdue": (HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    "unavailable": (HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
    "cancelled": (HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError"),
}
_INTERNAL = (HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


class RequestFailed(GracefulHTTPError):  # type: ignore[misc]
    """A failure that vLLM's server passes on as it is."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message, failure.status)
        self.failure = failure


class BusEngineClient(EngineCoreClient):  # type: ignore[misc]
    """Requests go to the bus, tokens come from it; there is no engine behind it in this process."""

    engine_ranks_managed = (0,)

    class resources:
        """``AsyncLLM`` looks here for the health of engine processes: there are none."""

        engine_dead = False

    def __init__(
        self,
        bus: Bus,
        member_id: str,
        api: str,
        salts: CacheSalts,
        metrics: GatewayMetrics,
        *,
        deadline_s: float = 600.0,
    ) -> None:
        self.channel = Channel(
            bus, member_id, api, metrics, on_arrivals=self._arrive, on_failure=self._fail, deadline_s=deadline_s
        )
        self._salts = salts
        # Arrays of any size inline: a request is one buffer.
        self._encoder = MsgpackEncoder(size_threshold=1 << 62)
        self._outputs = VllmOutputs()
        self._queue: asyncio.Queue[EngineCoreOutputs] = asyncio.Queue()
        self._callers: dict[str, Caller] = {}
        self._streams: dict[str, TextStream] = {}
        """Requests in the fast lane, by their id in the engine."""
        self._processor: OutputProcessor | None = None

    def attach(self, processor: OutputProcessor) -> None:
        """``processor`` holds what ``AsyncLLM`` keeps of each request."""
        self._processor = processor

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Accept a request of the current caller. Raises what becomes a 400, 429 or 503."""
        stream = current_stream.get()
        if stream is not None:
            stream.attach(request, self._requests.request_states[request.request_id].detokenizer)
        await self._add(request, stream)

    async def add_stream(self, request: EngineCoreRequest, stream: TextStream) -> None:
        """The same for a request that ``AsyncLLM`` does not know."""
        stream.attach(request, IncrementalDetokenizer.from_new_request(self._requests.tokenizer, request))
        await self._add(request, stream)

    async def _add(self, asked: EngineCoreRequest, stream: TextStream | None) -> None:
        # As it is, it may be the pattern of others.
        request = copy.copy(asked)
        params = request.sampling_params = copy.copy(asked.sampling_params)
        caller = current_caller.get()
        if caller is None:
            raise RuntimeError("a request without a caller: the gateway's middleware is missing")
        local_id = request.request_id
        reservation: Reservation | None = None
        try:
            refuse_unsupported(request)
            if caller.limiter is not None:
                prompt_tokens = len(request.prompt_token_ids)
                reservation = caller.limiter.reserve(prompt_tokens, params.max_tokens, time.monotonic())
                params.max_tokens = reservation.max_tokens
            salt = request_salt(self._salts.owner(caller.tenant), request.cache_salt)
            page_salt = self._salts.worker_salt(caller.tenant, salt)
            codec = VllmRequestCodec(request, salt, self._encoder, page_salt)
            self._callers[local_id] = caller
            if stream is not None:
                self._streams[local_id] = stream
            settle = None if reservation is None else partial(_settle, reservation)
            await self.channel.open(local_id, caller.tenant, caller.klass, codec, caller.received_s, settle)
        except BaseException as error:
            if reservation is not None:
                reservation.cancel(time.monotonic())
            self._drop(local_id)
            raise _http_error(caller, error) from error
        caller.accepted = True

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._callers.pop(request_id, None)
            self._streams.pop(request_id, None)
        self.channel.cancel(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        return await self._queue.get()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        return ("generate",)

    def shutdown(self, timeout: float | None = None) -> None:
        """Nothing to do: the gateway stops the channel, on its event loop."""

    def _arrive(self, arrivals: list[Arrival]) -> None:
        others: list[Arrival] = []
        stopped: list[str] = []
        for arrival in arrivals:
            local_id, delta, reason = arrival.local_id, arrival.delta, arrival.reason
            stream = self._streams.get(local_id)
            if stream is None:
                others.append(arrival)
            else:
                tokens = delta.tokens[arrival.skip :] if arrival.skip else delta.tokens
                if stream.arrive(tokens, reason, delta.stop_reason, delta.cached_tokens):
                    stopped.append(local_id)
                elif reason is not None:
                    self._finish(local_id)
            if reason is not None:
                self._callers.pop(local_id, None)
        if others:
            self._queue.put_nowait(EngineCoreOutputs(outputs=[self._outputs.output(arrival) for arrival in others]))
        for local_id in stopped:
            self._finish(local_id)
            self._callers.pop(local_id, None)
        self.channel.cancel(stopped)

    def _finish(self, local_id: str) -> None:
        """A request of the fast lane is over: ``AsyncLLM`` forgets it as if it had seen its last output."""
        self._streams.pop(local_id, None)
        state = self._requests.request_states.get(local_id)
        if state is not None:
            self._requests._finish_request(state)

    @property
    def _requests(self) -> OutputProcessor:
        assert self._processor is not None
        return self._processor

    def _fail(self, call: Call, fail: Fail) -> None:
        status, kind = _FAILURES.get(fail.code, _INTERNAL)
        message = f"the request {fail.message}" if kind == _INTERNAL[1] else fail.message
        retry_after_s = _RETRY_AFTER_S if status is HTTPStatus.SERVICE_UNAVAILABLE else None
        failure = Failure(status, kind, message, retry_after_s)
        caller = self._callers.get(call.local_id)
        if caller is not None:
            caller.failure = failure
        self._end(call.local_id, RequestFailed(failure))

    def _end(self, local_id: str, error: RequestFailed) -> None:
        """Raise ``error`` from ``AsyncLLM.generate`` and stop the other choices of the same request."""
        stream = self._streams.pop(local_id, None)
        if stream is not None:
            stream.fail(error)
        state = self._requests.request_states.get(local_id)
        if state is None:
            self._callers.pop(local_id, None)
            return
        parent = state.parent_req
        choices = [local_id] if parent is None else sorted({local_id, *parent.child_requests})
        if stream is None:
            state.queue.put(error)
        stopped = self._requests.abort_requests(choices, internal=True)
        for request_id in stopped:
            self._callers.pop(request_id, None)
        self.channel.cancel(stopped)

    def _drop(self, local_id: str) -> None:
        """``AsyncLLM`` registers a request before it adds it and keeps it if that fails."""
        self._callers.pop(local_id, None)
        self._streams.pop(local_id, None)
        if self._processor is not None:
            self._processor.abort_requests([local_id], internal=True)


def _settle(reservation: Reservation, output_tokens: int) -> None:
    reservation.settle(output_tokens, time.monotonic())


def _http_error(caller: Caller, error: BaseException) -> BaseException:
    match error:
        case Refusal():
            refused: BaseException = VLLMValidationError(str(error))
            return refused
        case LimitExceeded():
            failure = error.failure
        case QueueFull():
            failure = Failure(HTTPStatus.TOO_MANY_REQUESTS, "RateLimitError", str(error), _RETRY_AFTER_S)
        case BusUnavailable():
            message = f"the request queue is unavailable: {error}"
            failure = Failure(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError", message, _RETRY_AFTER_S)
        case _:
            return error
    caller.failure = failure
    return RequestFailed(failure)
