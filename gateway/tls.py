"""The gateway's certificate: checked before it is used, and read again when its files change."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from llmserve.manifests.errors import ManifestError
from llmserve.manifests.schema import GatewayTls

log = logging.getLogger(__name__)

LOOK_S = 5.0


class ServerTls:
    """``context`` is what the socket listens with; new handshakes see what ``refresh`` has loaded."""

    def __init__(self, files: GatewayTls) -> None:
        """Raises ``ManifestError`` that names what cannot be used."""
        self._files = files
        self.context = _context(files)
        self._seen = self._stamps()

    def refresh(self) -> None:
        """Read the files again. Raises ``ManifestError``, then the last certificate stays in use."""
        seen = self._stamps()
        _context(self._files)
        try:
            self.context.load_cert_chain(self._files.cert, self._files.key)
            if self._files.client_ca is not None:
                self.context.load_verify_locations(cafile=self._files.client_ca)
        except OSError as error:
            raise ManifestError([f"spec.gateway.tls: {error}"]) from error
        self._seen = seen
        log.info("certificate %s is in use", self._files.cert)

    async def watch(self) -> None:
        """Refresh whenever a file changes, until cancelled. A secret's files may change one after the other."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                if self._stamps() != self._seen:
                    self.refresh()
            except (ManifestError, OSError) as error:
                log.warning("the certificate in use stays: %s", error)

    def _stamps(self) -> list[tuple[int, int]]:
        names = (self._files.cert, self._files.key, self._files.client_ca)
        # The target of a link: Kubernetes changes secrets by changing links.
        stats = [Path(name).stat() for name in names if name is not None]
        return [(stat.st_mtime_ns, stat.st_ino) for stat in stats]


def _context(files: GatewayTls) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(files.cert, files.key)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or str(error)
        raise ManifestError([f"spec.gateway.tls: {files.cert}, {files.key} cannot be used: {reason}"]) from error
    if files.client_ca is not None:
        try:
            context.load_verify_locations(cafile=files.client_ca)
        except OSError as error:
            reason = error.strerror or str(error)
            raise ManifestError(
                [f"spec.gateway.tls.client_ca: {files.client_ca} cannot be used: {reason}"]
            ) from error
        context.verify_mode = ssl.CERT_REQUIRED
    return context
