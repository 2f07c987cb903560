"""Rules between fields: combinations that parse and can never work."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from llmserve.manifests.environment import hash_problem, secret_problem, url_problem
from llmserve.manifests.errors import Problem, shown
from llmserve.manifests.schema import ApiKey, Manifest, Security, Spec


def inconsistencies(manifest: Manifest) -> list[Problem]:
    """All of them, in the order of the manifest's sections."""
    return [problem for rule in _RULES for problem in rule(manifest.spec)]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def authenticates(security: Security) -> bool:
    """Whether callers must say who they are."""
    return bool(security.api_keys or security.api_keys_file or security.oidc)


def _models(spec: Spec) -> Iterator[Problem]:
    for path, model in (("primary", spec.models.primary), ("draft", spec.models.draft)):
        if model is not None and not model.id.strip():
            yield Problem(("spec", "models", path, "id"), "'' is not allowed; it must name a model")
    primary = spec.models.primary
    if primary.max_model_len == 1:
        yield Problem(
            ("spec", "models", "primary", "max_model_len"), "1 leaves no token to generate; it must be at least 2"
        )


def _engine(spec: Spec) -> Iterator[Problem]:
    engine, at = spec.engine, ("spec", "engine")
    if engine.simulated is not None and engine.kind != "simulated":
        yield Problem((*at, "simulated"), f"only with spec.engine.kind: simulated, and it is {engine.kind}")
    if engine.kind == "simulated":
        if engine.gpu_memory_utilization is not None:
            yield Problem((*at, "gpu_memory_utilization"), "has no effect with spec.engine.kind: simulated")
        if spec.models.draft is not None and spec.models.draft.enabled:
            yield Problem(("spec", "models", "draft"), "the simulated engine has none; set enabled: false")
        if spec.storageClasses:
            yield Problem(("spec", "storageClasses"), "the simulated engine has no pages to keep there; remove them")
    batched, seqs = engine.max_num_batched_tokens, engine.max_num_seqs
    if batched is not None and seqs is not None and batched < seqs:
        yield Problem(
            (*at, "max_num_batched_tokens"), f"{batched} must be at least spec.engine.max_num_seqs, which is {seqs}"
        )


def _prefill(spec: Spec) -> Iterator[Problem]:
    policies = spec.scheduling.policies
    if policies.chunked_prefill:
        return
    if policies.prefill_long_prompt_tokens is not None:
        yield Problem(
            ("spec", "scheduling", "policies", "prefill_long_prompt_tokens"),
            f"{policies.prefill_long_prompt_tokens} needs spec.scheduling.policies.chunked_prefill: true",
        )
    batched, length = spec.engine.max_num_batched_tokens, spec.models.primary.max_model_len
    if batched is not None and length is not None and batched < length:
        yield Problem(
            ("spec", "engine", "max_num_batched_tokens"),
            f"{batched} must be at least spec.models.primary.max_model_len, which is {length}, "
            "since spec.scheduling.policies.chunked_prefill is false",
        )


def _batch(spec: Spec) -> Iterator[Problem]:
    spared, seqs = spec.scheduling.policies.min_decode_slots, spec.engine.max_num_seqs
    if seqs is not None and spared >= seqs:
        yield Problem(
            ("spec", "scheduling", "policies", "min_decode_slots"),
            f"{spared} must be below spec.engine.max_num_seqs, which is {seqs}: batch work could never run",
        )


def _budgets(spec: Spec) -> Iterator[Problem]:
    tokens, length = spec.budgets.max_tokens_in_flight, spec.models.primary.max_model_len
    if tokens is not None and length is not None and tokens < length:
        yield Problem(
            ("spec", "budgets", "max_tokens_in_flight"),
            f"{tokens} must be at least spec.models.primary.max_model_len, which is {length}: "
            "a request of that length could never run",
        )


def _kv_cache(spec: Spec) -> Iterator[Problem]:
    yield from _tiers(spec)
    eviction = spec.kv_cache.eviction
    if eviction is None:
        return
    at = ("spec", "kv_cache", "eviction")
    if eviction.hot_keep_secs > eviction.evict_if_inactive_secs:
        yield Problem(
            (*at, "hot_keep_secs"),
            f"{eviction.hot_keep_secs} must be at most evict_if_inactive_secs, "
            f"which is {eviction.evict_if_inactive_secs}",
        )
    for tenant in eviction.tenant_hotset_gb:
        yield from _unknown_tenant(spec, tenant, (*at, "tenant_hotset_gb", tenant))


def _tiers(spec: Spec) -> Iterator[Problem]:
    kv_cache, at = spec.kv_cache, ("spec", "kv_cache")
    if not spec.storageClasses:
        for field in ("disk_dtype", "encryption"):
            if getattr(kv_cache, field) is not None:
                yield Problem((*at, field), "has no effect without spec.storageClasses")
        if kv_cache.eviction is not None and kv_cache.dram_gb is None:
            yield Problem((*at, "eviction"), "has no effect without spec.storageClasses or spec.kv_cache.dram_gb")
    if kv_cache.encryption is not None and not kv_cache.encryption.startswith("env:"):
        yield Problem((*at, "encryption"), "must be env:NAME: the key does not belong into the manifest")
    elif kv_cache.encryption is not None and (message := secret_problem(kv_cache.encryption)):
        yield Problem((*at, "encryption"), message)


def _storage(spec: Spec) -> Iterator[Problem]:
    for name, count in Counter(storage.name for storage in spec.storageClasses).items():
        if count > 1:
            yield Problem(("spec", "storageClasses"), f"name {shown(name)} stands {count} times; each must be unique")
    for index, storage in enumerate(spec.storageClasses):
        at = ("spec", "storageClasses", index)
        needed = "path" if storage.type == "filesystem" else "bucket"
        if not getattr(storage, needed):
            yield Problem((*at, needed), f"missing; a storage class of type {storage.type} needs it")
        foreign = ("bucket", "region", "endpoint_url", "prefix") if storage.type == "filesystem" else _FILES_ONLY
        for field in foreign:
            if value := getattr(storage, field):
                yield Problem((*at, field), f"{shown(value)} has no meaning for type {storage.type}")


def _transfer(spec: Spec) -> Iterator[Problem]:
    order, at = spec.transfer.engine_order, ("spec", "transfer")
    if not order:
        yield Problem((*at, "engine_order"), "the list is empty; it must name at least one of nixl, ucx, nccl")
    for name, count in Counter(order).items():
        if count > 1:
            yield Problem((*at, "engine_order"), f"{name} stands {count} times; once is allowed")
    for name, options in (("ucx", spec.transfer.ucx), ("nccl", spec.transfer.nccl)):
        if options is not None and name not in order:
            yield Problem((*at, name), f"has no effect: {name} is not in spec.transfer.engine_order")


def _deployment(spec: Spec) -> Iterator[Problem]:
    resources, replicas = spec.deployment.resources, spec.deployment.replicas
    if replicas.prefill and (resources.prefill_gpu > 0) != (resources.decode_gpu > 0):
        yield Problem(
            ("spec", "deployment", "resources"),
            f"prefill_gpu is {resources.prefill_gpu} and decode_gpu {resources.decode_gpu}; "
            "both must be 0 or neither, since KV pages of CPUs and GPUs differ",
        )


def _gateway(spec: Spec) -> Iterator[Problem]:
    gateway, at = spec.gateway, ("spec", "gateway")
    if not gateway.host.strip():
        yield Problem((*at, "host"), "'' is not allowed; it must be an address to listen on")
    elif not is_loopback(gateway.host) and not authenticates(spec.security):
        yield Problem(
            (*at, "host"),
            f"{shown(gateway.host)} can be reached from outside and spec.security.api_keys is empty: "
            "name keys (or api_keys_file, or oidc), or listen on 127.0.0.1",
        )
    if gateway.port and gateway.port == gateway.metrics_port:
        yield Problem((*at, "metrics_port"), f"{gateway.port} is spec.gateway.port already")


def _bus(spec: Spec) -> Iterator[Problem]:
    bus, at = spec.bus, ("spec", "bus")
    for name, value in (("url", bus.url), ("token", bus.token)):
        if value is not None and (message := secret_problem(value)):
            yield Problem((*at, name), message)
    if bus.tls is not None:
        if bus.url is None:
            yield Problem((*at, "tls"), "is for an external server, and spec.bus.url names none")
        if (bus.tls.cert is None) != (bus.tls.key is None):
            lacking = "key" if bus.tls.key is None else "cert"
            yield Problem((*at, "tls", lacking), "missing; cert and key go together")
    if bus.url is None:
        if bus.replicas > 1:
            yield Problem((*at, "replicas"), f"{bus.replicas} needs an external cluster; name it in spec.bus.url")
        return
    if message := url_problem(bus.url):
        yield Problem((*at, "url"), message)
    if bus.state_dir is not None:
        yield Problem((*at, "state_dir"), "is for the embedded server, and spec.bus.url names another one")
    if bus.sync != "interval":
        yield Problem((*at, "sync"), "is for the embedded server, and spec.bus.url names another one")


def _security(spec: Spec) -> Iterator[Problem]:
    at = ("spec", "security")
    seen: dict[str, int] = {}
    for index, entry in enumerate(spec.security.api_keys):
        key, tenant = (entry.key, entry.tenant) if isinstance(entry, ApiKey) else (entry, "default")
        if message := secret_problem(key) or hash_problem(key):
            yield Problem((*at, "api_keys", index), message)
        if key in seen:
            yield Problem((*at, "api_keys", index), f"is the same key as api_keys[{seen[key]}]")
        seen.setdefault(key, index)
        yield from _unknown_tenant(spec, tenant, (*at, "api_keys", index, "tenant"))
    yield from _oidc(spec)
    groups: dict[str, str] = {}
    for group, tenants in spec.security.cache_sharing.items():
        for index, tenant in enumerate(tenants):
            place = (*at, "cache_sharing", group, index)
            yield from _unknown_tenant(spec, tenant, place)
            if tenant in groups:
                yield Problem(place, f"{shown(tenant)} is in group {groups[tenant]} already; a tenant has one group")
            groups.setdefault(tenant, group)


def _oidc(spec: Spec) -> Iterator[Problem]:
    seen: set[str] = set()
    for index, provider in enumerate(spec.security.oidc):
        at = ("spec", "security", "oidc", index)
        url = urlsplit(provider.issuer)
        if url.scheme != "https" and not (url.scheme == "http" and is_loopback(url.hostname or "")):
            yield Problem((*at, "issuer"), f"{shown(provider.issuer)} must be an https:// URL")
        if provider.issuer in seen:
            yield Problem((*at, "issuer"), f"{shown(provider.issuer)} stands twice")
        seen.add(provider.issuer)
        for name in ("audience", "tenant_claim"):
            if not getattr(provider, name).strip():
                yield Problem((*at, name), "'' is not allowed")


def _unknown_tenant(spec: Spec, tenant: str, path: tuple[str | int, ...]) -> Iterator[Problem]:
    tenants = spec.scheduling.fair_share.tenants
    if tenant not in tenants:
        yield Problem(
            path, f"{shown(tenant)} is no tenant of spec.scheduling.fair_share.tenants: {', '.join(sorted(tenants))}"
        )


_FILES_ONLY = ("path", "gds", "fsync")
_RULES: tuple[Callable[[Spec], Iterator[Problem]], ...] = (
    _models,
    _engine,
    _prefill,
    _batch,
    _budgets,
    _kv_cache,
    _storage,
    _transfer,
    _deployment,
    _gateway,
    _bus,
    _security,
)
