"""Per-tenant limits, pure: token buckets of a minute, open requests, context and models.

Each gateway keeps whole buckets and takes from them what the others report (``spending``): a burst over several
gateways can exceed a limit by what they accept within one report, about a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

from llmserve.gateway.caller import Failure
from llmserve.manifests.schema import Limits, Tenant

_MINUTE_S = 60.0
_SILENT_AFTER_S = 5.0
"""Open requests of a gateway that reports no more are forgotten."""


class LimitExceeded(Exception):
    """A limit refuses the request."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


class Bucket:
    """``per_minute`` units, refilled evenly; it may go below zero by what others took meanwhile."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._updated_s = now

    def level(self, now: float) -> float:
        gained = max(0.0, now - self._updated_s) * self.per_minute / _MINUTE_S
        self._level = min(float(self.per_minute), self._level + gained)
        self._updated_s = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Negative gives back."""
        self._level = min(float(self.per_minute), self.level(now) - amount)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` is there, 0 if it is."""
        lacking = min(amount, self.per_minute) - self.level(now)
        return max(0.0, lacking * _MINUTE_S / self.per_minute)

    def resize(self, per_minute: int, now: float) -> None:
        """Another limit; what was spent stays spent."""
        spent = self.per_minute - self.level(now)
        self.per_minute = per_minute
        self._level = per_minute - spent


@dataclass(slots=True)
class Spent:
    """What this gateway let through since its last report."""

    requests: int = 0
    tokens: int = 0


class TenantLimiter:
    """The limits of one tenant on one gateway. Times are monotonic seconds."""

    def __init__(self, tenant: str, limits: Limits, now: float) -> None:
        self.tenant = tenant
        self.limits = limits
        self.open = 0
        """HTTP requests open on this gateway."""
        self.spent = Spent()
        self._requests: Bucket | None = None
        self._tokens: Bucket | None = None
        self._open_elsewhere: dict[str, tuple[int, float]] = {}
        self.change(limits, now)

    def change(self, limits: Limits, now: float) -> None:
        """Other limits from now on."""
        self.limits = limits
        self._requests = _resized(self._requests, limits.requests_per_minute, now)
        self._tokens = _resized(self._tokens, limits.tokens_per_minute, now)

    def enter(self, now: float) -> None:
        """A request begins; ``leave`` must follow. Raises ``LimitExceeded``."""
        limits = self.limits
        if limits.concurrency is not None and self.open + self._elsewhere(now) >= limits.concurrency:
            raise _exceeded(f"Tenant {self.tenant} has {limits.concurrency} requests open, its limit", 1.0)
        if self._requests is not None:
            wait_s = self._requests.wait_s(1, now)
            if wait_s > 0:
                raise _exceeded(_per_minute(self.tenant, "requests", limits.requests_per_minute), wait_s)
            self._requests.take(1, now)
        self.spent.requests += 1
        self.open += 1

    def leave(self) -> None:
        self.open -= 1

    def reserve(self, prompt_tokens: int, max_tokens: int, now: float) -> Reservation:
        """Tokens for one engine request: how many it may generate, and what to settle. Raises ``LimitExceeded``."""
        context = self.limits.max_context_tokens
        if context is not None:
            if prompt_tokens >= context:
                text = f"The maximum context length of tenant {self.tenant} is {context} tokens; the prompt has"
                raise LimitExceeded(
                    Failure(HTTPStatus.BAD_REQUEST, "BadRequestError", f"{text} {prompt_tokens}", None)
                )
            max_tokens = min(max_tokens, context - prompt_tokens)
        wanted = prompt_tokens + max_tokens
        if self._tokens is not None:
            wanted = min(wanted, self._tokens.per_minute)
            wait_s = self._tokens.wait_s(wanted, now)
            if wait_s > 0:
                raise _exceeded(_per_minute(self.tenant, "tokens", self.limits.tokens_per_minute), wait_s)
        self._charge(wanted, now)
        return Reservation(self, prompt_tokens, max_tokens, wanted)

    def heard(self, gateway: str, requests: int, tokens: int, open_requests: int, now: float) -> None:
        """Another gateway's report."""
        if self._requests is not None:
            self._requests.take(requests, now)
        if self._tokens is not None:
            self._tokens.take(tokens, now)
        self._open_elsewhere[gateway] = (open_requests, now)

    def headers(self, now: float) -> list[tuple[bytes, bytes]]:
        """``x-ratelimit-*`` as OpenAI's clients know them; none for what is not limited."""
        found = []
        for name, bucket in ((b"requests", self._requests), (b"tokens", self._tokens)):
            if bucket is not None:
                reset_s = bucket.wait_s(bucket.per_minute, now)
                found += [
                    (b"x-ratelimit-limit-" + name, b"%d" % bucket.per_minute),
                    (b"x-ratelimit-remaining-" + name, b"%d" % max(0, int(bucket.level(now)))),
                    (b"x-ratelimit-reset-" + name, duration(reset_s).encode()),
                ]
        return found

    def _charge(self, tokens: int, now: float) -> None:
        self.spent.tokens += tokens
        if self._tokens is not None:
            self._tokens.take(tokens, now)

    def _elsewhere(self, now: float) -> int:
        self._open_elsewhere = {
            gateway: seen for gateway, seen in self._open_elsewhere.items() if now - seen[1] < _SILENT_AFTER_S
        }
        return sum(count for count, _ in self._open_elsewhere.values())


class Reservation:
    """Tokens taken from the tenant's bucket for one engine request."""

    def __init__(self, limiter: TenantLimiter, prompt_tokens: int, max_tokens: int, charged: int) -> None:
        self._limiter = limiter
        self._prompt_tokens = prompt_tokens
        self._charged = charged
        self.max_tokens = max_tokens
        """That the request may generate."""

    def settle(self, output_tokens: int, now: float) -> None:
        """The request has ended: what it has not used goes back, whatever it used beyond is taken."""
        self._correct(self._prompt_tokens + output_tokens, now)

    def cancel(self, now: float) -> None:
        """The request was refused: all of it goes back."""
        self._correct(0, now)

    def _correct(self, used: int, now: float) -> None:
        self._limiter._charge(used - self._charged, now)
        self._charged = used


class TenantLimits:
    """The limiters of all tenants."""

    def __init__(self, tenants: Mapping[str, Tenant], now: float) -> None:
        self._limiters = {name: TenantLimiter(name, tenant.limits, now) for name, tenant in tenants.items()}

    def of(self, tenant: str) -> TenantLimiter | None:
        return self._limiters.get(tenant)

    def change(self, tenants: Mapping[str, Tenant], now: float) -> None:
        """Other tenants and limits from now on; what was spent stays spent."""
        for name, tenant in tenants.items():
            known = self._limiters.get(name)
            if known is None:
                self._limiters[name] = TenantLimiter(name, tenant.limits, now)
            else:
                known.change(tenant.limits, now)
        for name in set(self._limiters) - set(tenants):
            del self._limiters[name]

    def all(self) -> list[TenantLimiter]:
        return list(self._limiters.values())


def duration(seconds: float) -> str:
    """As OpenAI writes it: ``12ms``, ``1.5s``, ``6m0s``."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)}m{int(rest)}s" if minutes else f"{rest:.3g}s"


def _resized(bucket: Bucket | None, per_minute: int | None, now: float) -> Bucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return Bucket(per_minute, now)
    bucket.resize(per_minute, now)
    return bucket


def _per_minute(tenant: str, what: str, limit: int | None) -> str:
    return f"Tenant {tenant} has reached its limit of {limit} {what} per minute"


def _exceeded(message: str, wait_s: float) -> LimitExceeded:
    after_s = max(1, -int(-wait_s // 1))
    text = f"{message}. Please try again in {duration(wait_s)}."
    return LimitExceeded(Failure(HTTPStatus.TOO_MANY_REQUESTS, "RateLimitError", text, after_s))
