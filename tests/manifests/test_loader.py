"""A manifest is read whole or refused with one clear line for each problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmserve.manifests.loader import ManifestError, load, parse
from llmserve.manifests.schema import Tenant
from tests.manifests.samples import EXAMPLE, SHIPPED, errors, manifest, small


def test_the_example_of_the_specification_survives_a_round_trip() -> None:
    read = parse(EXAMPLE, "example")
    assert parse(yaml.safe_dump(msgspec.to_builtins(read)), "again") == read
    assert read.spec.models.primary.tensor_parallel == 2
    assert read.spec.scheduling.fair_share.tenants["premium"].weight == 2.0
    assert read.spec.transfer.engine_order == ("nixl", "ucx", "nccl")


@pytest.mark.parametrize("name", ["local", "sim", "llmserve", "compose"])
def test_every_shipped_manifest_is_valid(name: str) -> None:
    load(SHIPPED / f"{name}.yaml")


def test_a_tenant_named_default_always_exists() -> None:
    read = manifest("scheduling: {fair_share: {tenants: {gold: {weight: 3}}}}")
    assert read.spec.scheduling.fair_share.tenants == {"default": Tenant(), "gold": Tenant(weight=3.0)}


def test_a_wrong_word_is_answered_with_line_path_value_choice_and_the_nearest() -> None:
    assert errors(EXAMPLE.replace("dtype: bf16", "dtype: bfl6")) == [
        "f.yaml:8: spec.models.primary.dtype: 'bfl6' is not allowed; "
        "it must be one of auto, bf16, fp16, fp32 (did you mean bf16?)"
    ]


def test_an_unknown_field_is_answered_with_the_fields_there_and_the_nearest() -> None:
    assert errors(small("engine: {max_seqs: 3}")) == [
        "f.yaml:2: spec.engine.max_seqs: unknown field (did you mean max_num_seqs?); allowed here: kind, "
        "enforce_eager, max_num_seqs, max_num_batched_tokens, kv_space_gb, gpu_memory_utilization, stall_s, simulated"
    ]


def test_all_wrong_fields_are_reported_at_once() -> None:
    text = small("budgets: {max_kv_hbm_gb: -1}, gateway: {port: 70000}, bus: {sync: never}", primary="id: 5")
    assert [line.split(":")[2].strip() for line in errors(text)] == [
        "spec.models.primary.id",
        "spec.budgets.max_kv_hbm_gb",
        "spec.gateway.port",
        "spec.bus.sync",
    ]


def test_all_conflicts_between_fields_are_reported_at_once() -> None:
    spec = "gateway: {port: 80, metrics_port: 80}, transfer: {engine_order: []}, engine: {simulated: {}}"
    assert len(errors(small(spec))) == 3


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        ("security: {api_keys: [{key: k, tenant: x}]}", "spec.security.api_keys[0].tenant", "no tenant"),
        ("security: {api_keys: [k, k]}", "spec.security.api_keys[1]", "the same key"),
        ("security: {api_keys: ['']}", "spec.security.api_keys[0]", "is empty"),
        ("security: {api_keys: ['env:A-B']}", "spec.security.api_keys[0]", "environment variable"),
        ("security: {cache_sharing: {g: [x]}}", "spec.security.cache_sharing.g[0]", "no tenant"),
        ("security: {cache_sharing: {g: [default], h: [default]}}", "spec.security.cache_sharing.h[0]", "one group"),
        (
            "kv_cache: {dram_gb: 1, eviction: {tenant_hotset_gb: {x: 1}}}",
            "spec.kv_cache.eviction.tenant_hotset_gb.x",
            "no tenant",
        ),
        (
            "engine: {kind: simulated}, storageClasses: [{name: d, type: filesystem, path: /p}]",
            "spec.storageClasses",
            "simulated engine",
        ),
        ("kv_cache: {disk_dtype: int8}", "spec.kv_cache.disk_dtype", "no effect without spec.storageClasses"),
        ("kv_cache: {eviction: {}}", "spec.kv_cache.eviction", "no effect without"),
        (
            "storageClasses: [{name: d, type: filesystem, path: /p}], kv_cache: {encryption: hunter2}",
            "spec.kv_cache.encryption",
            "must be env:NAME",
        ),
        (
            "storageClasses: [{name: d, type: filesystem, path: /p, endpoint_url: u}]",
            "spec.storageClasses[0].endpoint_url",
            "no meaning",
        ),
        (
            "kv_cache: {dram_gb: 1, eviction: {hot_keep_secs: 1000}}",
            "spec.kv_cache.eviction.hot_keep_secs",
            "at most",
        ),
        ("storageClasses: [{name: a, type: filesystem}]", "spec.storageClasses[0].path", "needs it"),
        ("storageClasses: [{name: a, type: s3}]", "spec.storageClasses[0].bucket", "needs it"),
        ("storageClasses: [{name: a, type: s3, bucket: b, gds: true}]", "spec.storageClasses[0].gds", "no meaning"),
        (
            "storageClasses: [{name: a, type: s3, bucket: b}, {name: a, type: s3, bucket: c}]",
            "spec.storageClasses",
            "unique",
        ),
        ("gateway: {host: 0.0.0.0}", "spec.gateway.host", "api_keys is empty"),
        ("gateway: {host: ''}", "spec.gateway.host", "address"),
        ("gateway: {port: 80, metrics_port: 80}", "spec.gateway.metrics_port", "already"),
        ("engine: {simulated: {}}", "spec.engine.simulated", "kind: simulated"),
        ("engine: {kind: simulated, gpu_memory_utilization: 0.5}", "spec.engine.gpu_memory_utilization", "no effect"),
        ("engine: {max_num_seqs: 9, max_num_batched_tokens: 8}", "spec.engine.max_num_batched_tokens", "at least"),
        ("budgets: {max_tokens_in_flight: 10}", "spec.budgets.max_tokens_in_flight", "max_model_len"),
        (
            "scheduling: {policies: {chunked_prefill: false, prefill_long_prompt_tokens: 5}}",
            "spec.scheduling.policies.prefill_long_prompt_tokens",
            "chunked_prefill",
        ),
        (
            "scheduling: {policies: {chunked_prefill: false}}, engine: {max_num_batched_tokens: 50}",
            "spec.engine.max_num_batched_tokens",
            "chunked_prefill",
        ),
        ("transfer: {engine_order: []}", "spec.transfer.engine_order", "at least one"),
        ("transfer: {engine_order: [nixl, nixl]}", "spec.transfer.engine_order", "once"),
        ("transfer: {ucx: {}}", "spec.transfer.ucx", "no effect"),
        ("deployment: {resources: {decode_gpu: 1}}", "spec.deployment.resources", "both must be 0"),
        ("bus: {url: 'http://h'}", "spec.bus.url", "nats://"),
        ("bus: {url: 'nats://h:1', state_dir: d}", "spec.bus.state_dir", "embedded"),
        ("bus: {url: 'nats://h:1', sync: always}", "spec.bus.sync", "embedded"),
        ("bus: {replicas: 3}", "spec.bus.replicas", "external cluster"),
    ],
)
def test_a_combination_that_cannot_work_is_refused(spec: str, path: str, words: str) -> None:
    (line,) = errors(small(spec, primary="id: m, max_model_len: 100"))
    assert line.startswith(f"f.yaml:2: {path}: ")
    assert words in line


def test_a_public_address_is_allowed_with_keys() -> None:
    assert manifest("gateway: {host: 0.0.0.0}, security: {api_keys: [k]}").spec.gateway.host == "0.0.0.0"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_a_loopback_address_needs_no_keys(host: str) -> None:
    assert manifest(f"gateway: {{host: '{host}'}}").spec.gateway.host == host


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1\nb: 2", "f.yaml:2:2: not YAML: while parsing a flow sequence expected ',' or ']', but got ':'"),
        ("", "f.yaml: is empty; it must be a mapping of apiVersion, kind, metadata, spec"),
        ("- a", "f.yaml: is a list; it must be a mapping of apiVersion, kind, metadata, spec"),
        ("kind: LLMServe\nkind: LLMServe", "f.yaml:2: key 'kind' stands here a second time"),
        ("a: " + "[" * 5000, "f.yaml: nested too deeply"),
    ],
)
def test_text_that_is_no_manifest_is_one_line(text: str, line: str) -> None:
    assert errors(text) == [line]


@pytest.mark.parametrize("value", ["&a [*a]", "9" * 5000, "0x" + "F" * 9000, "!!timestamp 2001-99-99", "\0", "0b_"])
def test_values_that_break_readers_are_refused(value: str) -> None:
    (line,) = errors(small(f"engine: {{max_num_seqs: {value}}}"))
    assert len(line) < 200


@pytest.mark.parametrize("weight", [".inf", ".nan", "0", "-1", "true", "heavy"])
def test_a_weight_is_a_finite_number_above_zero(weight: str) -> None:
    (line,) = errors(small(f"scheduling: {{fair_share: {{tenants: {{default: {{weight: {weight}}}}}}}}}"))
    assert line.endswith("it must be a number above 0")


def test_a_name_may_not_end_in_a_line_break() -> None:
    assert errors(EXAMPLE.replace("{name: prod}", '{name: "prod\\n"}'))


@pytest.mark.parametrize(
    "spec",
    [
        "security: {api_keys: [hush, hush]}",
        "security: {api_keys: [{key: [hush]}]}",
        "bus: {url: 'http://hush@h'}",
        "bus: {token: [hush]}",
        "security: {api_keys: [[hush]]}",
    ],
)
def test_no_message_tells_a_secret(spec: str) -> None:
    assert errors(small(spec))
    assert "hush" not in "\n".join(errors(small(spec)))


def test_a_file_that_is_not_there_or_not_text_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"none\.yaml: cannot be read: No such file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(ManifestError, match="cannot be read: Is a directory"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ManifestError, match="is not UTF-8 text: byte 3 is 0xff"):
        load(tmp_path / "latin.yaml")


_LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary()
_KEYS = st.sampled_from(["name", "id", "spec", "kind", "weight", "key", "tenant", "path"]) | st.text() | st.integers()
_VALUES = st.recursive(_LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3))


@st.composite
def _mutated(draw: st.DrawFn) -> str:
    """The example with a few values replaced, removed or added anywhere."""
    root = yaml.safe_load(EXAMPLE)
    for _ in range(draw(st.integers(1, 4))):
        node: Any = root
        while True:
            if isinstance(node, list) and node:
                place: Any = draw(st.integers(0, len(node) - 1))
            elif isinstance(node, dict) and node:
                place = draw(st.sampled_from(list(node)))
            else:
                break
            child = node[place]
            if not isinstance(child, list | dict) or draw(st.integers(0, 4)) == 0:
                if isinstance(node, dict) and draw(st.booleans()):
                    node[draw(_KEYS)] = draw(_VALUES)
                elif draw(st.booleans()):
                    del node[place]
                else:
                    node[place] = draw(_VALUES)
                break
            node = child
    return yaml.safe_dump(root)


@given(_mutated())
def test_a_mutated_manifest_is_read_or_refused_in_lines_and_never_a_traceback(text: str) -> None:
    for line in errors(text):
        assert line.startswith("f.yaml:")
        assert line.splitlines() == [line]


@given(st.text(alphabet=st.sampled_from("ab:-[]{}&*!|>'\"#%@`?,\n \t0_.x~<") | st.characters(), max_size=60))
def test_any_text_is_read_or_refused_in_lines(text: str) -> None:
    for line in errors(text):
        assert line.splitlines() == [line]
