"""The gateway's Prometheus metrics: base units, names ``llmserve_*``."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_INTER_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
_TOKENS_PER_S = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 500, 1000)


class GatewayMetrics:
    """Metrics of one gateway on ``registry``."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._tenants: dict[str, TenantMetrics] = {}
        self._answers: dict[tuple[str, str, int], Counter] = {}
        tenant = ["tenant"]
        self.ttft = Histogram(
            "llmserve_time_to_first_token_seconds",
            "From the client's request to its first token",
            tenant,
            registry=registry,
            buckets=_LATENCY_S,
        )
        self.inter_token = Histogram(
            "llmserve_inter_token_latency_seconds",
            "Between tokens of one request, per token",
            tenant,
            registry=registry,
            buckets=_INTER_TOKEN_S,
        )
        self.decode_rate = Histogram(
            "llmserve_decode_tokens_per_second",
            "Output tokens behind the first over the time they took, of one request",
            tenant,
            registry=registry,
            buckets=_TOKENS_PER_S,
        )
        self.end_to_end = Histogram(
            "llmserve_request_duration_seconds",
            "From the client's request to the end of the response",
            tenant,
            registry=registry,
            buckets=_LATENCY_S,
        )
        self.requests = Counter(
            "llmserve_requests",
            "API requests by outcome (ok, client_error, refused, error, disconnected)",
            ["tenant", "outcome", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter("llmserve_prompt_tokens", "Prompt tokens accepted", tenant, registry=registry)
        self.output_tokens = Counter("llmserve_output_tokens", "Output tokens received", tenant, registry=registry)
        self.cached_tokens = Counter(
            "llmserve_cached_prompt_tokens", "Prompt tokens that were not computed", tenant, registry=registry
        )
        self.attempts = Counter(
            "llmserve_attempts_repeated",
            "Attempts after the first, by what becomes of the tokens delivered (resume, replay, once)",
            ["mode"],
            registry=registry,
        )
        self.attempts_failed = Counter(
            "llmserve_requests_failed", "Accepted requests that ended in an error", ["code"], registry=registry
        )
        self.stale_deltas = Counter(
            "llmserve_deltas_dropped",
            "Deltas that were known, of an older attempt, or of no request",
            registry=registry,
        )
        self.connections_refused = Counter(
            "llmserve_connections_refused",
            "HTTP connections ended before a request, by status",
            ["status"],
            registry=registry,
        )
        self.slow_clients = Counter(
            "llmserve_slow_clients", "Clients disconnected since they did not read", registry=registry
        )
        self.batch_requests = Counter(
            "llmserve_batch_requests",
            "Requests of batches and direct publishers by outcome (ok, error; refused: to be tried again)",
            ["tenant", "outcome"],
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "llmserve_batch_request_duration_seconds",
            "From the start of a batch's or publisher's request to its response",
            tenant,
            registry=registry,
            buckets=_LATENCY_S,
        )
        self.batches = Counter("llmserve_batches", "Batches by their end", ["tenant", "status"], registry=registry)
        self.batch_takeovers = Counter(
            "llmserve_batch_takeovers", "Batches taken over from a gateway that is gone", registry=registry
        )
        self.tokens = Counter(
            "llmserve_web_tokens",
            "Web tokens checked, by outcome (accepted, refused, no_tenant, issuer_away)",
            ["outcome"],
            registry=registry,
        )
        self.reloads = Counter(
            "llmserve_reloads", "Reloads of the manifest by outcome", ["outcome"], registry=registry
        )
        self.open_requests = Gauge("llmserve_open_requests", "API requests being answered", registry=registry)

    def of_tenant(self, tenant: str) -> TenantMetrics:
        """The tenant's own, looked up once: looking labels up costs more than counting."""
        known = self._tenants.get(tenant)
        if known is None:
            known = self._tenants[tenant] = TenantMetrics(self, tenant)
        return known

    def resubmitted(self, mode: str) -> None:
        self.attempts.labels(mode).inc()

    def answered(self, tenant: str, outcome: str, status: int, duration_s: float) -> None:
        """``status`` 0: no response was started."""
        answers = self._answers.get((tenant, outcome, status))
        if answers is None:
            answers = self._answers[tenant, outcome, status] = self.requests.labels(tenant, outcome, str(status))
        answers.inc()
        self.of_tenant(tenant).answered(duration_s)


class TenantMetrics:
    """What is counted per token and per request, of one tenant."""

    def __init__(self, metrics: GatewayMetrics, tenant: str) -> None:
        self._ttft = metrics.ttft.labels(tenant)
        self._end_to_end = metrics.end_to_end.labels(tenant)
        self._inter_token = metrics.inter_token.labels(tenant)
        self._decode_rate = metrics.decode_rate.labels(tenant)
        self._prompt_tokens = metrics.prompt_tokens.labels(tenant)
        self._output_tokens = metrics.output_tokens.labels(tenant)
        self._cached_tokens = metrics.cached_tokens.labels(tenant)

    def accepted(self, prompt_tokens: int) -> None:
        self._prompt_tokens.inc(prompt_tokens)

    def answered(self, duration_s: float) -> None:
        self._end_to_end.observe(duration_s)

    def first_tokens(self, ttft_s: float, cached_tokens: int) -> None:
        self._ttft.observe(ttft_s)
        self._cached_tokens.inc(cached_tokens)

    def next_tokens(self, waited_s: float, tokens: int) -> None:
        """``waited_s`` is shared by all ``tokens`` of one step."""
        self._inter_token.observe(waited_s / tokens)

    def ended(self, output_tokens: int, first_token_s: float | None, now_s: float) -> None:
        """Also of a request that was cancelled or failed: what it has got is counted."""
        self._output_tokens.inc(output_tokens)
        if output_tokens > 1 and first_token_s is not None and now_s > first_token_s:
            self._decode_rate.observe((output_tokens - 1) / (now_s - first_token_s))
