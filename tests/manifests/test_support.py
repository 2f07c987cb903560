"""What is not there yet is named, never ignored."""

from __future__ import annotations

import pytest

from llmserve.manifests.errors import ManifestError
from llmserve.manifests.loader import load
from llmserve.manifests.support import require_supported, unsupported
from tests.manifests.samples import SHIPPED, manifest


def test_each_such_field_of_the_example_is_named_with_its_value() -> None:
    found = unsupported(load(SHIPPED / "llmserve.yaml"))
    assert [(item.path, item.value) for item in found] == [
        ("spec.deployment.mode", "k8s"),
    ]


@pytest.mark.parametrize("name", ["local", "sim", "compose"])
def test_the_other_shipped_manifests_ask_for_nothing_that_is_missing(name: str) -> None:
    require_supported(load(SHIPPED / f"{name}.yaml"))


def test_a_start_is_refused_with_one_line_for_each() -> None:
    with pytest.raises(ManifestError) as caught:
        require_supported(manifest("deployment: {mode: k8s}"))
    assert [line.split(" (")[0] for line in caught.value.lines] == [
        "not supported yet: spec.deployment.mode: k8s",
    ]
