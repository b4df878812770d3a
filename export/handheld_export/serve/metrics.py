"""What Prometheus may know. No label comes from a client.

With several workers the values lie in files of the folder that PROMETHEUS_MULTIPROC_DIR
names, and whichever worker is asked adds them up.
"""

from __future__ import annotations

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)

REQUESTS = Counter("handheld_text_requests", "Answered requests.", ["route", "status"])
SECONDS = Histogram("handheld_text_request_seconds", "Of a request.", ["route"], buckets=_SECONDS)
PROMPTS = Counter(
    "handheld_text_prompts", "Prompts by where their embeddings came from.", ["source"]
)
TRUNCATED = Counter("handheld_text_truncated", "Prompts longer than the encoders read.")
ENCODE_SECONDS = Histogram("handheld_text_encode_seconds", "Of a batch.", buckets=_SECONDS)
BATCH = Histogram("handheld_text_batch_prompts", "Of a batch.", buckets=(1, 2, 4, 8, 16, 32, 64))
QUEUE = Gauge(
    "handheld_text_queue", "Prompts that wait for the encoders.", multiprocess_mode="livesum"
)
CACHE_BYTES = Gauge("handheld_text_cache_bytes", "In memory.", multiprocess_mode="livesum")
REDIS_ERRORS = Counter("handheld_text_redis_errors", "Times that Redis did not answer.")


def exposition() -> tuple[bytes, str]:
    """Return all metrics as text, and its content type."""
    registry = REGISTRY
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
