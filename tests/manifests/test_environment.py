"""``env:NAME`` is read when a process starts, and a missing variable is named."""

from __future__ import annotations

import pytest

from llmserve.manifests.environment import missing_variables, resolve
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.schema import ApiKey
from tests.manifests.samples import manifest

_SECRETS = (
    "bus: {url: 'env:URL', token: 'env:TOKEN'}, "
    "security: {api_keys: ['env:KEY', {key: 'env:PREMIUM', tenant: default}, plain]}"
)
_VALUES = {"URL": "nats://h:1", "TOKEN": "t", "KEY": "k", "PREMIUM": "p"}


def test_every_secret_is_resolved() -> None:
    spec = resolve(manifest(_SECRETS), _VALUES).spec
    assert (spec.bus.url, spec.bus.token) == ("nats://h:1", "t")
    assert spec.security.api_keys == ("k", ApiKey(key="p", tenant="default"), "plain")


def test_all_missing_variables_are_named_at_once() -> None:
    with pytest.raises(ManifestError) as caught:
        resolve(manifest(_SECRETS), {"URL": "nats://h:1", "KEY": "", "PREMIUM": "p"})
    assert caught.value.lines == (
        "spec.bus.token: the environment variable TOKEN is not set or empty",
        "spec.security.api_keys[0]: the environment variable KEY is not set or empty",
    )


def test_missing_variables_are_known_without_resolving() -> None:
    assert [item.name for item in missing_variables(manifest(_SECRETS), _VALUES | {"KEY": ""})] == ["KEY"]


def test_a_manifest_without_variables_resolves_to_itself() -> None:
    plain = manifest("security: {api_keys: [k]}")
    assert resolve(plain, {}) == plain


@pytest.mark.parametrize(("name", "value"), [("URL", "http://hush"), ("KEY", "p")])
def test_values_that_cannot_work_are_refused_without_telling_them(name: str, value: str) -> None:
    with pytest.raises(ManifestError) as caught:
        resolve(manifest(_SECRETS), _VALUES | {name: value})
    assert "hush" not in str(caught.value)
