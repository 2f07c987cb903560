"""``llmserve health URL``: exit 0 if the URL answers 200, else 1. The health check of the container services."""

from __future__ import annotations

import argparse
import ssl
import urllib.error
import urllib.request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="such as http://127.0.0.1:8000/health/ready")
    parser.add_argument("--ca", metavar="FILE", help="the authority of https URLs; the system's otherwise")
    parser.add_argument("--timeout-s", type=float, default=2.0)


def run(arguments: argparse.Namespace) -> int:
    try:
        trust = ssl.create_default_context(cafile=arguments.ca)
        with urllib.request.urlopen(arguments.url, timeout=arguments.timeout_s, context=trust) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, OSError, ValueError) as error:
        what = f"--ca {arguments.ca}" if isinstance(error, FileNotFoundError) else arguments.url
        print(f"{what}: {error}")
        return 1
