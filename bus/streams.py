"""The deployment's streams: made if missing, changed if the manifest has changed."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from llmserve.bus.base import BusError
from llmserve.bus.jetstream import STREAM_NAME_IN_USE, STREAM_NOT_FOUND, ApiError, Config, JetStream
from llmserve.bus.settings import BusSettings
from llmserve.bus.subjects import Subjects

FILE_AGE_S = 30 * 86400.0
PUBLISHED_AGE_S = 86400.0
SUBMIT_MAX_MESSAGES = 20_000
SUBMIT_MAX_BYTES = 1 << 20
"""Of one message. The server reserves a stream's own ``max_bytes`` on its disk, which many tenants would use up."""

logger = logging.getLogger(__name__)


def stream_configs(subjects: Subjects, settings: BusSettings) -> list[Config]:
    """What the streams must look like: requests, results, state."""
    common: Config = {
        "storage": "file",
        "retention": "limits",
        "num_replicas": settings.replicas,
        "allow_direct": True,
    }
    return [
        {
            **common,
            "name": subjects.request_stream,
            "subjects": [subjects.all_requests],
            "discard": "new",
            "discard_new_per_subject": True,
            "max_msgs_per_subject": settings.queue_max_len,
            "max_age": _ns(settings.request_max_age_s),
            "duplicate_window": _ns(min(settings.duplicate_window_s, settings.request_max_age_s)),
        },
        {
            **common,
            "name": subjects.result_stream,
            "subjects": [subjects.all_results],
            "discard": "old",
            "max_msgs_per_subject": 1,
            "max_age": _ns(settings.result_max_age_s),
            "duplicate_window": _ns(min(settings.duplicate_window_s, settings.result_max_age_s)),
        },
        {
            # As a key-value bucket is laid out, so that the stock tools can read it.
            **common,
            "name": f"KV_{subjects.bucket}",
            "subjects": [f"$KV.{subjects.bucket}.>"],
            "discard": "new",
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "deny_delete": True,
        },
    ]


def batch_stream_configs(subjects: Subjects, settings: BusSettings) -> list[Config]:
    """What gateways keep: files, batches, results of lines, results for publishers."""
    common: Config = {
        "storage": "file",
        "retention": "limits",
        "num_replicas": settings.replicas,
        "allow_direct": True,
    }
    return [
        {
            **common,
            "name": f"OBJ_{subjects.file_bucket}",
            "subjects": [f"$O.{subjects.file_bucket}.C.>", f"$O.{subjects.file_bucket}.M.>"],
            "discard": "new",
            "allow_rollup_hdrs": True,
            "max_age": _ns(FILE_AGE_S),
            "duplicate_window": _ns(settings.duplicate_window_s),
        },
        {
            **common,
            "name": f"KV_{subjects.batch_bucket}",
            "subjects": [f"$KV.{subjects.batch_bucket}.>"],
            "discard": "new",
            "max_msgs_per_subject": 1,
            "allow_rollup_hdrs": True,
            "max_age": _ns(FILE_AGE_S),
        },
        {
            **common,
            "name": subjects.line_stream,
            "subjects": [subjects.all_lines],
            "max_msgs_per_subject": 1,
            "max_age": _ns(2 * PUBLISHED_AGE_S),
        },
        {
            **common,
            "name": subjects.published_stream,
            "subjects": [subjects.all_published],
            "max_msgs_per_subject": 1,
            "max_age": _ns(PUBLISHED_AGE_S),
        },
    ]


def submit_config(subjects: Subjects, tenant: str, settings: BusSettings) -> Config:
    """One stream for each tenant: ids are compared within it, and its limits are the tenant's own."""
    return {
        "name": subjects.submit_stream(tenant),
        "subjects": [subjects.submit(tenant)],
        "storage": "file",
        "retention": "workqueue",
        "num_replicas": settings.replicas,
        "allow_direct": True,
        "discard": "new",
        "max_msgs": SUBMIT_MAX_MESSAGES,
        "max_msg_size": SUBMIT_MAX_BYTES,
        "max_age": _ns(PUBLISHED_AGE_S),
        "duplicate_window": _ns(3600.0),
    }


def leader_subject(subjects: Subjects) -> str:
    """Key of the bucket that holds the leading router's name; its revision is the epoch."""
    return f"$KV.{subjects.bucket}.leader"


async def ensure_streams(api: JetStream, subjects: Subjects, settings: BusSettings) -> None:
    """Make the streams as ``stream_configs`` says, whatever is there already. Raises ``BusError``."""
    for config in stream_configs(subjects, settings):
        await _ensure(api, config)


async def ensure_batch_streams(
    api: JetStream, subjects: Subjects, settings: BusSettings, tenants: Iterable[str]
) -> None:
    """Make the streams of files, batches and direct publishing. Raises ``BusError``."""
    for config in batch_stream_configs(subjects, settings):
        await _ensure(api, config)
    for tenant in tenants:
        await _ensure(api, submit_config(subjects, tenant, settings))


async def _ensure(api: JetStream, wanted: Config) -> None:
    name = str(wanted["name"])
    try:
        actual = (await api.call(f"STREAM.INFO.{name}")).config
    except ApiError as error:
        if error.failure.err_code != STREAM_NOT_FOUND:
            raise
        try:
            await api.call(f"STREAM.CREATE.{name}", wanted)
            return
        except ApiError as refused:
            if refused.failure.err_code != STREAM_NAME_IN_USE:
                raise
            # Another member made it, from another manifest.
            actual = (await api.call(f"STREAM.INFO.{name}")).config
    changed = {key: value for key, value in wanted.items() if actual.get(key) != value}
    if not changed:
        return
    logger.info("stream %s: changing %s", name, ", ".join(sorted(changed)))
    try:
        await api.call(f"STREAM.UPDATE.{name}", {**actual, **wanted})
    except ApiError as error:
        raise BusError(f"stream {name} cannot be changed in {', '.join(sorted(changed))}: {error}") from error


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
