"""Rejections on their way to a gateway, over links that may lose them."""

from __future__ import annotations

from llmserve.bus.flow.actions import NotifyGateway

REPEATS = 3


class Rejections:
    """Each is repeated until its gateway withdraws the request, which is how it answers, or ``REPEATS`` times.

    The request is off the stream by then, so that the router knows nothing else of it.
    """

    def __init__(self, retry_s: float) -> None:
        self._retry_s = retry_s
        self._open: dict[str, tuple[NotifyGateway, int, float]] = {}
        """By request: what was said, how often, and when it is said again."""

    def __len__(self) -> int:
        return len(self._open)

    def add(self, notice: NotifyGateway, now_s: float) -> None:
        """It was sent for the first time."""
        self._open[notice.message.request_id] = (notice, 0, now_s + self._retry_s)

    def answered(self, request_id: str) -> None:
        self._open.pop(request_id, None)

    def due(self, now_s: float) -> list[NotifyGateway]:
        """What is to be said again now."""
        due: list[NotifyGateway] = []
        for request_id, (notice, repeats, at_s) in list(self._open.items()):
            if at_s > now_s:
                continue
            due.append(notice)
            if repeats + 1 < REPEATS:
                self._open[request_id] = (notice, repeats + 1, now_s + self._retry_s)
            else:
                del self._open[request_id]
        return due
