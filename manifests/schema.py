"""The manifest as frozen structs. The YAML spells fields exactly as here.

Units stand in the names. A GB is 2**30 bytes, a KB 2**10; a Gbps is 10**9 bits a second. Mappings are plain dicts
when loaded: the type says that nobody may write to them.

``docs/manifest.md`` is the reference for users and is held to these structs by a test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Positive = Annotated[int, Meta(ge=1)]
NonNegative = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
Port = Annotated[int, Meta(ge=0, le=65535)]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every mapping in the manifest."""


class Metadata(Part, frozen=True, kw_only=True):
    name: Name
    """Deployment: part of every subject on the bus."""


class PrimaryModel(Part, frozen=True, kw_only=True):
    id: str
    """Hugging Face id, local folder, or ``smollm2-135m``: the one that ships as a package."""
    served_name: str = ""
    """Name that clients use; the id by default."""
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """The model's own by default, fp32 on CPUs that are slow in it."""
    max_model_len: Positive | None = None
    """Tokens of prompt and output together; the model's own limit by default."""
    tensor_parallel: Positive = 1
    pipeline_parallel: Positive = 1


class DraftModel(Part, frozen=True, kw_only=True):
    id: str
    enabled: bool = True
    speculative_tokens: Positive = 4


class Models(Part, frozen=True, kw_only=True):
    primary: PrimaryModel
    draft: DraftModel | None = None


class Limits(Part, frozen=True, kw_only=True):
    """What the callers of one tenant may ask for, over all gateways; None is no bound."""

    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    """Prompt and output. A request reserves its ``max_tokens`` and gives back what it has not used."""
    concurrency: Positive | None = None
    """HTTP requests that are open at once."""
    max_context_tokens: Annotated[int, Meta(ge=2)] | None = None
    """Prompt and output of one request; output ends there, a longer prompt is refused."""
    models: tuple[str, ...] = ()
    """Names of the models that the tenant may use; empty: all."""


class Tenant(Part, frozen=True, kw_only=True):
    weight: PositiveFloat = 1.0
    ttft_slo_ms: PositiveFloat | None = None
    max_concurrency: Positive | None = None
    """Requests of the tenant that run at once, in all stages together."""
    limits: Limits = Limits()


class FairShare(Part, frozen=True, kw_only=True):
    tenants: Mapping[Name, Tenant] = msgspec.field(default_factory=lambda: {"default": Tenant()})
    """``default`` is always there once loaded, with weight 1 if the manifest does not name it."""
    kv_tokens_per_gb: Annotated[float, Meta(ge=0)] = 0.0
    """Cost, in prompt tokens, of a GB of KV pages that a tenant's handoffs move."""


class Policies(Part, frozen=True, kw_only=True):
    chunked_prefill: bool = True
    prefill_long_prompt_tokens: Positive | None = None
    """A prompt longer than this is long: vLLM prefills it in pieces of at most so many tokens, beside others."""
    min_decode_slots: NonNegative = 0
    """Slots of each decode worker that batch work never gets."""
    batch_share: Annotated[float, Meta(ge=0, lt=1)] = 0.05
    """Part of the service that batch work is guaranteed while interactive work waits."""
    max_wait_s: PositiveFloat = 30.0
    """How long shorter requests of a tenant may overtake one of its requests."""
    reject_after_s: PositiveFloat | None = None
    """An interactive request that has not begun for so long is refused with 503; None: it waits, up to 600 s."""
    aging_tokens_per_s: Annotated[float, Meta(ge=0)] = 100.0
    """Cost, in prompt tokens, that a second of waiting outweighs inside a tenant."""
    queue_max_len: Positive = 2000
    """Requests of one tenant, queued and running; one more is refused with 429."""


class Scheduling(Part, frozen=True, kw_only=True):
    fair_share: FairShare = FairShare()
    policies: Policies = Policies()


class Budgets(Part, frozen=True, kw_only=True):
    """Cluster-wide bounds of the deployment; None is no bound."""

    max_tokens_in_flight: Positive | None = None
    max_prefill_concurrency: Positive | None = None
    max_decode_concurrency: Positive | None = None
    max_kv_hbm_gb: PositiveFloat | None = None
    """KV space of all engines together, divided among them evenly."""
    max_kv_io_gbps: PositiveFloat | None = None
    """Rate of all KV transfers together, divided among the decode engines evenly."""


class Eviction(Part, frozen=True, kw_only=True):
    hot_keep_secs: NonNegative = 300
    evict_if_inactive_secs: NonNegative = 900
    tenant_hotset_gb: Mapping[Name, PositiveFloat] = {}


class KVCache(Part, frozen=True, kw_only=True):
    page_size_kb: Positive | None = None
    """Wish for the bytes of one page on one rank; rounded to what the device's block sizes allow."""
    prefix_caching: bool = True
    hbm_dtype: Literal["auto", "fp16", "bf16", "fp8"] = "auto"
    disk_dtype: Literal["raw", "int8", "zstd"] | None = None
    """How pages are kept in the storage classes: as they are, compressed, or quantized and compressed; raw by
    default."""
    dram_gb: PositiveFloat | None = None
    """DRAM tier of each engine, over all its ranks; 1 GB by default where there are storage classes, else none."""
    encryption: str | None = None
    """``env:NAME`` of a key of 32 bytes, hex or base64: pages in the storage classes are sealed with AES-256-GCM."""
    eviction: Eviction | None = None


class StorageClass(Part, frozen=True, kw_only=True):
    name: Name
    type: Literal["filesystem", "s3"]
    path: str | None = None
    gds: bool = False
    bucket: str | None = None
    region: str | None = None
    prefetch_on_prefix: bool = False
    """When the first pages of a prefix are read, those that follow are brought one tier up."""
    prefix: str = ""
    """Of the objects' keys, in a bucket that holds other things too."""
    endpoint_url: str | None = None
    """Of a server that speaks S3; that of AWS in ``region`` by default."""
    capacity_gb: PositiveFloat | None = None
    """Pages are evicted above it; no bound by default."""
    fsync: bool = False
    """Each page is safe from power cuts before it counts. Without it a power cut costs the last pages written."""
    timeout_s: PositiveFloat = 5.0
    """Deadline of one read or write, with all its retries."""


class NixlOptions(Part, frozen=True, kw_only=True):
    backend_policy: Literal["auto", "ucx"] = "auto"


class UcxOptions(Part, frozen=True, kw_only=True):
    rdma: bool = True


class NcclOptions(Part, frozen=True, kw_only=True):
    p2p: bool = True


class Transfer(Part, frozen=True, kw_only=True):
    engine_order: tuple[Literal["nixl", "ucx", "nccl"], ...] = ("nixl",)
    nixl: NixlOptions = NixlOptions()
    ucx: UcxOptions | None = None
    nccl: NcclOptions | None = None
    same_host: bool = True
    """Between processes of one host the same host's own engine goes before those of ``engine_order``."""
    ahead: bool | None = None
    """Whether pages of a prompt in chunks move while it is computed; None: where that was seen to gain, on CPUs."""
    lease_s: PositiveFloat = 30.0
    """How long prefilled pages wait for their decode worker."""
    timeout_s: PositiveFloat = 10.0
    """Deadline of one transfer; after it the decode worker computes the prompt itself."""


class Replicas(Part, frozen=True, kw_only=True):
    prefill: NonNegative = 1
    """0: decode workers do both."""
    decode: Positive = 1


class Resources(Part, frozen=True, kw_only=True):
    """GPUs of one replica; 0 is the CPU. At least tensor_parallel x pipeline_parallel are taken."""

    prefill_gpu: NonNegative = 0
    decode_gpu: NonNegative = 0


class Deployment(Part, frozen=True, kw_only=True):
    mode: Literal["local", "k8s"] = "local"
    replicas: Replicas = Replicas()
    resources: Resources = Resources()


class Simulated(Part, frozen=True, kw_only=True):
    """Timing model of the simulated engine: a step takes ``step_ms`` plus the cost of its tokens."""

    step_ms: Annotated[float, Meta(ge=0)] = 5.0
    prefill_us_per_token: Annotated[float, Meta(ge=0)] = 20.0
    decode_us_per_request: Annotated[float, Meta(ge=0)] = 50.0
    transfer_gbps: PositiveFloat = 100.0


class Engine(Part, frozen=True, kw_only=True):
    kind: Literal["vllm", "simulated"] = "vllm"
    enforce_eager: bool = False
    max_num_seqs: Positive | None = None
    """Requests that one engine runs at once; vLLM's default for the device otherwise."""
    max_num_batched_tokens: Positive | None = None
    kv_space_gb: PositiveFloat | None = None
    """KV space of one engine over all its ranks. Otherwise vLLM measures what is free on GPUs; 1 GB on CPUs."""
    gpu_memory_utilization: Annotated[float, Meta(gt=0, le=1)] | None = None
    stall_s: PositiveFloat = 120.0
    """An engine that has work and ends no step for so long hangs: its work runs elsewhere, and it is ended."""
    simulated: Simulated | None = None


class GatewayTls(Part, frozen=True, kw_only=True):
    """Files in PEM; read again when they change."""

    cert: str
    """The chain, the gateway's own certificate first."""
    key: str
    client_ca: str | None = None
    """Callers must show a certificate of one of these authorities, whatever else identifies them."""


class Batch(Part, frozen=True, kw_only=True):
    concurrency: Positive = 64
    """Requests of one batch, or of one tenant's direct publishing, that a gateway has in the deployment at once."""
    max_file_mb: Positive = 200
    """Size of an uploaded file."""


class Gateway(Part, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: Port = 8000
    metrics_port: Port = 9400
    max_body_kb: Positive = 4096
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    max_header_kb: Positive = 32
    header_timeout_s: PositiveFloat = 10.0
    """For a request's headers to arrive."""
    body_timeout_s: PositiveFloat = 60.0
    """For a request's body to arrive."""
    write_timeout_s: PositiveFloat = 30.0
    """A client that reads nothing for so long while there is something to read is disconnected."""
    request_timeout_s: PositiveFloat | None = None
    """From a request's arrival to the end of its response."""
    tls: GatewayTls | None = None
    batch: Batch = Batch()


class BusTls(Part, frozen=True, kw_only=True):
    """Files in PEM; read again before each connection."""

    ca: str | None = None
    """Authorities of the server's certificate; the system's by default."""
    cert: str | None = None
    """Ours, where the server asks for one; with ``key``."""
    key: str | None = None


class Bus(Part, frozen=True, kw_only=True):
    url: str | None = None
    """An external nats-server, or ``env:NAME``; several of one cluster with commas; None starts an embedded one."""
    token: str | None = None
    """Token that the server asks for, or ``user:password``, or ``env:NAME``."""
    state_dir: str | None = None
    """Of the embedded server; ``$XDG_STATE_HOME/llmserve/<deployment>`` by default."""
    sync: Literal["interval", "always"] = "interval"
    """When the embedded server writes to the disk: each second, or before each acknowledgement (for power cuts)."""
    replicas: Annotated[int, Meta(ge=1, le=5)] = 1
    """Servers of the external cluster that keep each stream; 3 outlive the loss of one."""
    tls: BusTls | None = None
    """For an external server; its URL may be ``nats://`` or ``tls://``."""


class ApiKey(Part, frozen=True, kw_only=True):
    key: str
    """``env:NAME``, or ``sha256:`` and the hash of the key in hex, or the key itself."""
    tenant: Name = "default"


class Oidc(Part, frozen=True, kw_only=True):
    """An issuer of JSON web tokens that callers may send instead of an API key."""

    issuer: str
    """Its URL as it stands in the claim ``iss``; ``/.well-known/openid-configuration`` is read below it."""
    audience: str
    """Must be in the claim ``aud``."""
    tenant_claim: str = "tenant"
    """Claim that names the caller's tenant."""
    keys_max_age_s: PositiveFloat = 3600.0
    """Age at which the issuer's keys are read again; an unknown key is looked up at once."""


class Security(Part, frozen=True, kw_only=True):
    api_keys: tuple[str | ApiKey, ...] = ()
    """A bare string belongs to the tenant ``default``. Empty: no authentication, and only on a loopback address."""
    api_keys_file: str | None = None
    """File of further keys as ``llmserve tenant add`` writes it: a line each, ``sha256:HEX TENANT``."""
    oidc: tuple[Oidc, ...] = ()
    cache_sharing: Mapping[Name, tuple[Name, ...]] = {}
    """Groups of tenants that may hit each other's prefix cache."""


class Spec(Part, frozen=True, kw_only=True):
    models: Models
    engine: Engine = Engine()
    scheduling: Scheduling = Scheduling()
    budgets: Budgets = Budgets()
    kv_cache: KVCache = KVCache()
    storageClasses: tuple[StorageClass, ...] = ()
    transfer: Transfer = Transfer()
    deployment: Deployment = Deployment()
    gateway: Gateway = Gateway()
    bus: Bus = Bus()
    security: Security = Security()


class Manifest(Part, frozen=True, kw_only=True):
    apiVersion: Literal["v1"] = "v1"
    kind: Literal["LLMServe"] = "LLMServe"
    metadata: Metadata
    spec: Spec
