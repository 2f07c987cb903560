"""Certificates for tests."""

from __future__ import annotations

from pathlib import Path

import trustme


class Authority:
    """Issues certificates into files of ``folder``."""

    def __init__(self, folder: Path, name: str = "ca") -> None:
        self._ca = trustme.CA()
        self._folder = folder
        self.file = folder / f"{name}.crt"
        self._ca.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str, *identities: str) -> tuple[Path, Path]:
        """(certificate chain, key) for the identities, written over those of the same ``name``."""
        issued = self._ca.issue_cert(*(identities or ("127.0.0.1", "localhost")))
        cert, key = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        # The key first: a watcher must not find the new certificate beside the old key for long.
        issued.private_key_pem.write_to_path(str(key))
        cert.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        return cert, key
