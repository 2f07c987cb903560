"""Names of subjects, streams and buckets of one deployment. Nothing else in the project spells a subject."""

from __future__ import annotations

import re

_AGAIN = "-again"

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def is_token(name: str) -> bool:
    """Whether ``name`` can stand as one token of a subject: a deployment, tenant or member name."""
    return _TOKEN.match(name) is not None


def again(klass: str) -> str:
    """Where later attempts of a class stand, so that a queue that others keep full does not stop a request that was
    accepted."""
    return klass if klass.endswith(_AGAIN) else klass + _AGAIN


class Subjects:
    """The subjects of one deployment. ``deployment`` and every name given must satisfy ``is_token``."""

    def __init__(self, deployment: str) -> None:
        if not is_token(deployment):
            raise ValueError(f"deployment name {deployment!r} is not one of letters, digits, '_' and '-'")
        self.deployment = deployment
        self.root = f"llm.{deployment}"
        stem = f"LLM_{deployment}"
        self.request_stream = f"{stem}_REQ"
        self.result_stream = f"{stem}_RESULT"
        self.bucket = f"{stem}_STATE"
        self.file_bucket = f"{stem}_FILES"
        self.batch_bucket = f"{stem}_BATCH"
        self.line_stream = f"{stem}_LINES"
        """Results of the lines of unfinished batches."""
        self.published_stream = f"{stem}_OUT"
        """Results for direct publishers."""
        self.all_lines = f"{self.root}.line.>"
        self.all_published = f"{self.root}.result.>"
        self.all_requests = f"{self.root}.req.>"
        self.all_results = f"{self.root}.finished.>"
        self.heartbeats = f"{self.root}.beat"
        self.events = f"{self.root}.event"
        """Workers to router: Accepted, Refused, HandedOff, Finished, Failed."""
        self.control = f"{self.root}.control"
        """Router and gateways to all: Sync, Cancel."""
        self.kv_events = f"{self.root}.kv.event"
        """Workers and the kv role to router: KvEvents."""
        self.spending = f"{self.root}.spending"
        """Gateway to gateways: Spending."""
        self.admin = f"{self.root}.admin"
        """The operator to all: Reload."""

    def request(self, klass: str, tenant: str) -> str:
        """A queue of the request stream, with its own limit; ``klass`` may be ``again`` of a class."""
        return f"{self.root}.req.{klass}.{tenant}"

    def parse_request(self, subject: str) -> tuple[str, str]:
        """(class, tenant) of a request's subject, of whichever attempt."""
        _, _, _, klass, tenant = subject.split(".")
        return klass.removesuffix(_AGAIN), tenant

    def result(self, tenant: str, request_id: str) -> str:
        """Record of a completion."""
        return f"{self.root}.finished.{tenant}.{request_id}"

    def line(self, tenant: str, batch: str, number: int) -> str:
        """Result of one line of a batch."""
        return f"{self.root}.line.{tenant}.{batch}.{number}"

    def lines(self, tenant: str, batch: str) -> str:
        return f"{self.root}.line.{tenant}.{batch}.>"

    def submit(self, tenant: str) -> str:
        """Requests of a tenant's own publishers."""
        return f"{self.root}.submit.{tenant}"

    def submit_stream(self, tenant: str) -> str:
        return f"LLM_{self.deployment}_SUBMIT_{tenant}"

    def published(self, tenant: str, message_id: str) -> str:
        """Result of a published request."""
        return f"{self.root}.result.{tenant}.{message_id}"

    def work(self, worker: str) -> str:
        """Grants for one worker."""
        return f"{self.root}.work.{worker}"

    def gateway(self, gateway: str) -> str:
        """Deltas, AttemptLost and Rejected for one gateway."""
        return f"{self.root}.gateway.{gateway}"

    def kv_resync(self, member: str) -> str:
        """KvResync for one worker, or one member of the kv role."""
        return f"{self.root}.kv.resync.{member}"

    def router(self, router: str) -> str:
        """Where a router listens, so that others can tell whether it lives."""
        return f"{self.root}.router.{router}"
