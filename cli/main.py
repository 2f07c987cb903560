"""``llmserve``: one command, each subcommand in a module of its own that is imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Sequence

_COMMANDS = {
    "up": "start the whole stack of a manifest and serve",
    "apply": "check a manifest and print the plan",
    "status": "show a running deployment",
    "tenant": "give a tenant an API key and a NATS credential",
    "submit": "run a file of requests as a batch and write the results",
    "reload": "read keys, limits and certificates of a running deployment again",
    "health": "ask a health endpoint; exit 0 if it is well",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; its exit code. Wrong usage ends in ``SystemExit(2)``, as argparse has it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser(words)
    parsed = parser.parse_args(words)
    try:
        code: int = importlib.import_module(_module(parsed.command)).run(parsed)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone, as `head` does. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmserve", description="LLM serving from one manifest.")
    parser.add_argument("--version", action="version", version=importlib.metadata.version("llmserve"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        if importlib.util.find_spec(_module(name)) is None:
            continue
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        # Only the chosen one is imported: `apply` must not wait for what `up` needs.
        if words and words[0] == name:
            importlib.import_module(_module(name)).add_arguments(command)
    return parser


def _module(command: str) -> str:
    return f"llmserve.cli.{command}"


if __name__ == "__main__":
    sys.exit(main())
