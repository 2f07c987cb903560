"""``llmserve tenant add``: an API key and a NATS credential for a tenant of the manifest."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from llmserve.bus.base import BusError
from llmserve.bus.statedir import StateDir
from llmserve.bus.tenants import accounts_config, new_seed, with_key
from llmserve.manifests.errors import ManifestError
from llmserve.manifests.loader import load
from llmserve.manifests.secrets import add_to_key_file, hash_of, new_key
from llmserve.manifests.state import state_dir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=["add"])
    parser.add_argument("tenant", help="a tenant of spec.scheduling.fair_share.tenants")
    parser.add_argument("-f", "--manifest", required=True, help="the manifest of the deployment")


def run(arguments: argparse.Namespace) -> int:
    """Print the secrets, once; 2 on bad input."""
    try:
        manifest = load(arguments.manifest)
        tenants = manifest.spec.scheduling.fair_share.tenants
        if arguments.tenant not in tenants:
            known = ", ".join(sorted(tenants))
            raise ManifestError([f"{arguments.tenant!r} is no tenant of {arguments.manifest}: {known}"])
        _add_key(manifest.spec.security.api_keys_file, arguments.tenant)
        seed, public = new_seed()
        print(f"NATS seed       {seed}")
        print(f"NATS public key {public}")
        state = StateDir(state_dir(manifest, os.environ))
        state.write_accounts(with_key(state.accounts(), manifest.metadata.name, arguments.tenant, public))
        if manifest.spec.bus.url is None:
            told = state.reconfigure()
            _note("the embedded server knows it " + ("now" if told else "from its next start on"))
        else:
            _note("the nats-server's accounts, of every tenant added here; reload it twice (docs/batch.md):")
            print(accounts_config(None, state.accounts()), end="")
    except (ManifestError, BusError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _add_key(file: str | None, tenant: str) -> None:
    key = new_key()
    print(f"API key         {key}")
    if file is None:
        _note(f"not kept: put {{key: '{hash_of(key)}', tenant: {tenant}}} into spec.security.api_keys")
    else:
        add_to_key_file(Path(file), key, tenant)
        _note(f"its hash is in {file}; 'llmserve reload' lets it in")


def _note(text: str) -> None:
    print(f"  {text}", file=sys.stderr)
