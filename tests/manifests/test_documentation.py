"""docs/manifest.md says what the structs say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from llmserve.manifests.loader import parse
from tests.manifests.documented import DocumentedField, manifest_fields

_PAGE = Path(__file__).parents[2] / "docs" / "manifest.md"
_ROW = re.compile(
    r"^\| `(?P<path>[^`]+)` \| (?P<type>.*?) \| (?P<default>.*?) \| `(?P<example>.*?)` \| (?P<meaning>.+) \|$"
)


def _rows() -> dict[str, re.Match[str]]:
    matches = [match for line in _PAGE.read_text().splitlines() if (match := _ROW.match(line))]
    rows = {match["path"]: match for match in matches}
    assert len(rows) == len(matches)
    return rows


def test_every_field_is_documented_and_no_other() -> None:
    assert list(_rows()) == [field.path for field in manifest_fields()]


@pytest.mark.parametrize("field", manifest_fields(), ids=lambda field: field.path)
def test_type_and_default_are_those_of_the_struct(field: DocumentedField) -> None:
    row = _rows()[field.path]

    assert (row["type"], row["default"].strip("`")) == (field.type, field.default)


def test_every_example_is_a_value_that_the_field_takes() -> None:
    tenants: dict[str, object] = {"default": {}, "premium": {}, "acme-web": {}, "acme-batch": {}}
    for path, row in _rows().items():
        text = row["example"]
        if text == "none":
            continue
        spec: dict[str, object] = {"models": {"primary": {"id": "m"}}}
        manifest = {"metadata": {"name": "d"}, "spec": spec}
        spec["scheduling"] = {"fair_share": {"tenants": dict(tenants)}}
        spec["security"] = {"api_keys": ["env:KEY"]}
        if path.startswith("spec.models.draft."):
            spec["models"] = {"primary": {"id": "m"}, "draft": {"id": "d"}}
        if path.startswith("spec.engine.simulated"):
            spec["engine"] = {"kind": "simulated"}
        if path.startswith(("spec.transfer.ucx", "spec.transfer.nccl")):
            spec["transfer"] = {"engine_order": ["nixl", "ucx", "nccl"]}
        if path == "spec.bus.replicas":
            spec["bus"] = {"url": "nats://host:4222"}
        if path.startswith("spec.bus.tls"):
            spec["bus"] = {"url": "tls://bus:4222"}
        if path.startswith("spec.gateway.tls"):
            spec["gateway"] = {"tls": {"cert": "/c", "key": "/k"}}
        if path.startswith("spec.security.oidc"):
            spec["security"] = {"oidc": [{"issuer": "https://i", "audience": "a"}]}
        if path.startswith("spec.kv_cache"):
            spec["storageClasses"] = [{"name": "s", "type": "filesystem", "path": "/p"}]
        if path.startswith("spec.storageClasses"):
            of_s3 = path.endswith(("bucket", "region", ".prefix", "endpoint_url"))
            store = {"type": "s3", "bucket": "b"} if of_s3 else {"type": "filesystem", "path": "/p"}
            spec["storageClasses"] = [{"name": "s", **store}]
        _put(manifest, path, yaml.safe_load("''" if text == "empty" else text))
        parse(yaml.safe_dump(manifest), path)


def _put(target: object, path: str, value: object) -> None:
    *parents, last = path.replace("[]", ".0").replace("<name>", "premium").split(".")
    for name in parents:
        target = target[int(name)] if isinstance(target, list) else _child(target, name)
    assert isinstance(target, dict)
    target[last] = {} if value == "" and last in ("cache_sharing", "tenant_hotset_gb") else value


def _child(target: object, name: str) -> object:
    assert isinstance(target, dict)
    return target.setdefault(name, {})
