"""TLS towards an external nats-server: its authorities, our certificate, read again before each connection."""

from __future__ import annotations

import logging
import ssl
from urllib.parse import urlsplit

from nats.errors import Error

from llmserve.bus.base import BusError
from llmserve.bus.wire import DirectClient
from llmserve.manifests.schema import BusTls

logger = logging.getLogger(__name__)


class PlainServer(Error):  # type: ignore[misc]
    """The server speaks no TLS, and is not told our token."""

    def __init__(self) -> None:
        super().__init__("the server does not ask for TLS, and the manifest does")


class TlsClient(DirectClient):
    """nats-py takes what the server offers; this one insists on TLS before it says anything."""

    async def _process_info(self, info: dict[str, object], initial_connection: bool = False) -> None:
        if initial_connection and not info.get("tls_required"):
            raise PlainServer
        await super()._process_info(info, initial_connection)


class ClientTls:
    """The context of a connection. A long-lived client keeps it: ``refresh`` changes what is in it."""

    def __init__(self, files: BusTls) -> None:
        """Raises ``BusError`` that names what cannot be read."""
        self._files = files
        try:
            self.context = ssl.create_default_context(cafile=files.ca)
            self.context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._load()
        except OSError as error:  # ssl.SSLError is one
            raise BusError(f"spec.bus.tls: {_named(files)} cannot be used: {error.strerror or error}") from error

    def refresh(self) -> None:
        """Read the files again for the next handshake; if one is not there or wrong just now, the last ones stay."""
        try:
            # Checked apart: a certificate without its key would break the context in use.
            ClientTls(self._files)
            if self._files.ca is not None:
                self.context.load_verify_locations(cafile=self._files.ca)
            self._load()
        except (BusError, OSError) as error:
            logger.warning("certificates are not read again: %s", error)

    def _load(self) -> None:
        if self._files.cert is not None:
            self.context.load_cert_chain(self._files.cert, self._files.key)


def client_tls(url: str, files: BusTls | None) -> ClientTls | None:
    """What ``url`` is to be reached with, None without TLS. Raises ``BusError``."""
    wanted = files is not None or urlsplit(url.partition(",")[0].strip()).scheme == "tls"
    return ClientTls(files or BusTls()) if wanted else None


def _named(files: BusTls) -> str:
    return ", ".join(name for name in (files.ca, files.cert, files.key) if name) or "the system's authorities"
