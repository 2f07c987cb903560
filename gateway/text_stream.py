"""One streamed answer of plain text: from token ids to bytes, without a task or an object for each token.

Whoever hears the tokens of an engine step detokenizes, encodes and writes them here at once. Only while a client does
not keep up do they wait for the task that serves it, which then sends all that has come as one event, as vLLM does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from llmserve.bus.messages import Reason
from llmserve.gateway.chunks import DONE, StreamChunks
from llmserve.gateway.http_protocol import Write

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer


class TextStream:
    """``arrive`` and ``fail`` put in what the bus brings, ``serve`` hands out what the client gets."""

    def __init__(
        self,
        chunks: StreamChunks,
        usage: Callable[[TextStream], bytes],
        error: Callable[[Exception], bytes],
    ) -> None:
        """``usage`` makes the event behind the last token, if one is wanted, ``error`` the one of a failure."""
        self._chunks = chunks
        self._usage = usage
        self._error = error
        self._text: list[str] = []
        self._came = asyncio.Event()
        self._write: Write | None = None
        """Set while the task waits and nothing waits for it."""
        self._begun = False
        self._left = False
        self._failure: Exception | None = None
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._detokenizer: BaseIncrementalDetokenizer | None = None
        self._stepwise = False
        self.request: EngineCoreRequest | None = None
        """The engine's, as it was made."""
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0

    def attach(self, request: EngineCoreRequest, detokenizer: BaseIncrementalDetokenizer) -> None:
        """The request is made; its tokens may come from now on."""
        self.request = request
        self._detokenizer = detokenizer
        # Without stop strings nothing is to be kept back, searched, or remembered.
        self._stepwise = not detokenizer.stop and hasattr(detokenizer, "stream")
        self.prompt_tokens = len(request.prompt_token_ids)

    def arrive(
        self, tokens: list[int], reason: Reason | None, stop_reason: int | str | None, cached_tokens: int | None
    ) -> bool:
        """New tokens of one engine step; true if the answer ends here although the engine goes on."""
        detokenizer = self._detokenizer
        assert detokenizer is not None
        if cached_tokens is not None:
            self.cached_tokens = cached_tokens
        stopped = None
        if self._stepwise:
            self.output_tokens += len(tokens)
            if reason is Reason.STOP and not detokenizer.include_stop_str_in_output:
                tokens = tokens[:-1]
            decode = detokenizer.decode_next
            text = decode(tokens[0]) if len(tokens) == 1 else "".join([decode(token) for token in tokens])
        else:
            known = detokenizer.num_output_tokens()
            stopped = detokenizer.update(tokens, reason is Reason.STOP)
            # A stop string cuts off the tokens behind the one that completes it.
            self.output_tokens += detokenizer.num_output_tokens() - known
            text = detokenizer.get_next_output_text(reason is not None or stopped is not None, True)
        if stopped is not None:
            self._finish_reason, self._stop_reason = "stop", stopped
        elif reason is not None:
            self._finish_reason, self._stop_reason = reason.value, stop_reason
        elif self._write is not None and self._write_now(self._write, text):
            return False
        self._text.append(text)
        self._came.set()
        return stopped is not None

    def fail(self, error: Exception) -> None:
        """The request has failed; nothing comes any more."""
        self._failure = error
        self._came.set()

    def leave(self) -> None:
        """The client is gone: ``serve`` returns."""
        self._left = True
        self._came.set()

    async def serve(self, send: Callable[[bytes], Awaitable[None]], write: Write | None) -> bytes | None:
        """Hand everything to ``send`` or, while the client keeps up, to ``write`` if there is one.

        Returns what is to be sent last, None if the client has left.
        """
        while not self._ended:
            if not self._text:
                self._write = write
            await self._came.wait()
            self._write = None
            self._came.clear()
            while not self._ended and (data := self._take()):
                await send(data)
        if self._left:
            return None
        rest = self._take()
        if self._failure is not None:
            return rest + self._error(self._failure) + DONE
        return rest + self._usage(self) + DONE

    @property
    def _ended(self) -> bool:
        return self._finish_reason is not None or self._failure is not None or self._left

    def _write_now(self, write: Write, text: str) -> bool:
        """Whether nothing of ``text`` is left to send."""
        data = self._chunks.text(text)
        if not self._begun:
            data = self._chunks.first() + data
        if data and not write(data):
            self._write = None
            return False
        self._begun = True
        return True

    def _take(self) -> bytes:
        """Events of what has come since the last call."""
        came, self._text = self._text, []
        if not came:
            return b""
        text = came[0] if len(came) == 1 else "".join(came)
        first = b"" if self._begun else self._chunks.first()
        self._begun = True
        if self._finish_reason is None:
            return first + self._chunks.text(text)
        return first + self._chunks.last(text, self._finish_reason, self._stop_reason)
