"""A real OpenID Connect issuer, of the package oidc-provider-mock, as a process; each start makes it another key."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx

from tests.processes import BIN, Process, answers, free_port, wait_for


class Issuer:
    """``start``, ask for tokens as a client does, ``rotate``, ``end``."""

    def __init__(self, folder: Path, users: dict[str, dict[str, object]]) -> None:
        self._log = folder / "issuer.log"
        self._port = free_port()
        self._users = users
        self.url = f"http://127.0.0.1:{self._port}"
        self._process: Process | None = None

    def start(self, *options: str) -> None:
        users = [json.dumps({"sub": sub, **more}) for sub, more in self._users.items()]
        claims = [word for user in users for word in ("--user-claims", user)]
        command = [str(BIN / "oidc-provider-mock"), "--port", str(self._port), *claims, *options]
        self._process = Process("issuer", command, self._log)
        wait_for(lambda: answers(f"{self.url}/.well-known/openid-configuration"), 20, "the issuer")

    def end(self) -> None:
        if self._process is not None:
            self._process.end()

    def rotate(self) -> None:
        """A new key in the place of the old one."""
        self.end()
        self.start()

    def token(self, user: str, audience: str) -> str:
        """An id token for ``audience``, by the authorization code flow."""
        query = {"client_id": audience, "redirect_uri": "http://app", "response_type": "code", "scope": "openid"}
        with httpx.Client(base_url=self.url) as client:
            answer = client.post("/oauth2/authorize", params=query, data={"sub": user})
            code = parse_qs(urlsplit(answer.headers["location"]).query)["code"][0]
            form = {"grant_type": "authorization_code", "code": code, "redirect_uri": "http://app"}
            tokens = client.post("/oauth2/token", data=form, auth=(audience, "secret")).json()
        return str(tokens["id_token"])
