"""``llmserve apply``: check a manifest and show what it would start."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from llmserve.manifests.errors import dotted
from llmserve.manifests.loader import ManifestError, load, missing_variables
from llmserve.manifests.machine import probe_machine
from llmserve.manifests.models import ModelError, ModelShape, hub_folder, model_shape, resolve_model
from llmserve.manifests.plan import Plan, make_plan
from llmserve.manifests.roles import RolePlan
from llmserve.manifests.schema import Manifest
from llmserve.manifests.sizes import GB
from llmserve.manifests.support import unsupported


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--file", required=True, type=Path, metavar="MANIFEST", help="the manifest, in YAML")


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 2 if the manifest is wrong or asks for what is not supported yet."""
    try:
        manifest = load(arguments.file)
        primary, draft = _shapes(manifest)
    except (ManifestError, ModelError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(render(make_plan(manifest, probe_machine(), primary, draft))))
    for variable in missing_variables(manifest, os.environ):
        print(f"  ! environment variable {variable.name} is not set ({dotted(variable.path)}); a start needs it")
    found = unsupported(manifest)
    if found:
        # Else the lines could overtake the plan where both streams are one.
        sys.stdout.flush()
        print("\n".join(str(item) for item in found), file=sys.stderr)
    return 2 if found else 0


def _shapes(manifest: Manifest) -> tuple[ModelShape | None, ModelShape | None]:
    """Shapes of the primary and the draft model, as far as their files are here."""
    models = manifest.spec.models
    # Pods find their models elsewhere; only this machine's own must be here.
    required = manifest.spec.deployment.mode == "local"
    draft = models.draft.id if models.draft is not None and models.draft.enabled else None
    return _shape(models.primary.id, required), None if draft is None else _shape(draft, required)


def _shape(model_id: str, required: bool) -> ModelShape | None:
    try:
        files = resolve_model(model_id)
        folder = Path(files.path) if files.local else hub_folder(model_id)
        return None if folder is None else model_shape(folder)
    except ModelError:
        if required:
            raise
        return None


def render(plan: Plan) -> Iterator[str]:
    """The plan as lines of aligned text."""
    yield f"deployment {plan.deployment}: {plan.engine} on {plan.device}, {plan.mode}"
    yield f"model      {plan.model}"
    yield ""
    yield from _table(("role", "replicas", "GPUs", "weights", "KV space", "runs in"), map(_role_row, plan.roles))
    yield ""
    yield from _pairs(_figures(plan))
    yield ""
    yield "budgets"
    yield from _table((), ((budget.name, budget.value, budget.share) for budget in plan.budgets))
    yield "tiers"
    yield from (f"  {tier}" for tier in plan.tiers)
    yield "transfer engines, in order"
    yield from _table(
        (), ((rung.engine, "available" if rung.available else "not available", rung.note) for rung in plan.ladder)
    )
    yield from (f"  ! {warning}" for warning in plan.warnings)


def _figures(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "longest request", "the model's limit" if plan.max_model_len is None else f"{plan.max_model_len} tokens"
    if plan.block is None:
        yield "KV block", "known once the model is here"
    else:
        note = f" ({plan.block.note})" if plan.block.note else ""
        yield "KV block", f"{plan.block.tokens} tokens, {plan.block.actual_kb:g} KB a page on each rank{note}"
    if plan.pages is not None and plan.block is not None:
        yield "KV pages", f"{plan.pages} for each engine, {plan.pages * plan.block.tokens} tokens"
    yield "memory", "unknown" if plan.memory_bytes is None else f"about {_gigabytes(plan.memory_bytes)} in all"
    yield "processes", str(sum(role.processes for role in plan.roles) + (plan.mode == "local"))


def _role_row(role: RolePlan) -> tuple[str, ...]:
    if role.role not in ("prefill", "decode", "both"):
        return role.role, str(role.replicas), "", "", "", role.runs_in
    weights = "unknown" if role.weight_bytes is None else _gigabytes(role.weight_bytes)
    kv_space = "measured" if role.kv_bytes is None else _gigabytes(role.kv_bytes)
    return role.role, str(role.replicas), str(role.gpus), weights, kv_space, role.runs_in


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / GB:.2f} GB"


def _pairs(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    return (f"{name:<17}{value}" for name, value in pairs)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = [head, *rows] if head else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield ("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))).rstrip()
