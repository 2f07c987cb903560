"""One streamed answer of plain text: from token ids to events, without a task or an object for each token.

Whoever hears the tokens of an engine step detokenizes them here at once. The one task that serves the client encodes
what has come since it last looked, so that a slow client gets fewer and larger events, as with vLLM.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from llmserve.bus.messages import Reason
from llmserve.gateway.chunks import DONE, StreamChunks

if TYPE_CHECKING:
    from vllm.v1.engine.detokenizer import BaseIncrementalDetokenizer


class TextStream:
    """``arrive`` and ``fail`` put in what the bus brings, ``events`` yields what the client gets."""

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
        self._failure: Exception | None = None
        self._finish_reason: str | None = None
        self._stop_reason: int | str | None = None
        self._detokenizer: BaseIncrementalDetokenizer | None = None
        self._stepwise = False
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.cached_tokens = 0

    def attach(self, detokenizer: BaseIncrementalDetokenizer, prompt_tokens: int) -> None:
        """The request is made; its tokens may come from now on."""
        self._detokenizer = detokenizer
        # Without stop strings nothing is to be kept back, searched, or remembered.
        self._stepwise = not detokenizer.stop and hasattr(detokenizer, "stream")
        self.prompt_tokens = prompt_tokens

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
            self._text.append(decode(tokens[0]) if len(tokens) == 1 else "".join([decode(token) for token in tokens]))
        else:
            known = detokenizer.num_output_tokens()
            stopped = detokenizer.update(tokens, reason is Reason.STOP)
            # A stop string cuts off the tokens behind the one that completes it.
            self.output_tokens += detokenizer.num_output_tokens() - known
            ended = reason is not None or stopped is not None
            self._text.append(detokenizer.get_next_output_text(ended, True))
        if stopped is not None:
            self._finish_reason, self._stop_reason = "stop", stopped
        elif reason is not None:
            self._finish_reason, self._stop_reason = reason.value, stop_reason
        self._came.set()
        return stopped is not None

    def fail(self, error: Exception) -> None:
        """The request has failed; nothing comes any more."""
        self._failure = error
        self._came.set()

    async def events(self) -> AsyncIterator[bytes]:
        """Everything the client gets."""
        begun = False
        while self._finish_reason is None and self._failure is None:
            await self._came.wait()
            self._came.clear()
            if data := self._take(begun):
                begun = True
                yield data
        if self._failure is not None:
            yield self._error(self._failure)
        elif usage := self._usage(self):
            yield usage
        yield DONE

    def _take(self, begun: bool) -> bytes:
        """What has come since the last call."""
        came, self._text = self._text, []
        if not came:
            return b""
        text = came[0] if len(came) == 1 else "".join(came)
        first = b"" if begun else self._chunks.first()
        if self._finish_reason is None:
            return first + self._chunks.text(text)
        return first + self._chunks.last(text, self._finish_reason, self._stop_reason)
