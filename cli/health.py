"""``llmserve health URL``: exit 0 if the URL answers 200, else 1. The health check of the container services."""

from __future__ import annotations

import argparse
import urllib.error
import urllib.request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", help="such as http://127.0.0.1:8000/health/ready")
    parser.add_argument("--timeout-s", type=float, default=2.0)


def run(arguments: argparse.Namespace) -> int:
    try:
        with urllib.request.urlopen(arguments.url, timeout=arguments.timeout_s) as answer:
            return 0 if answer.status == 200 else 1
    except (urllib.error.URLError, OSError, ValueError) as error:
        print(f"{arguments.url}: {error}")
        return 1
