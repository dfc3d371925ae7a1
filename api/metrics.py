"""What /metrics shows: Prometheus series of one service, in a registry of its own."""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Series of one service. Times are in seconds, sizes in bytes or tokens.

    `in_flight` is the number of requests being answered, for a service that drains.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "prunery_requests", "Requests answered.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "prunery_request_seconds",
            "From the request's head to the last byte of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self.in_flight = 0
        self._running = Gauge(
            "prunery_requests_running", "Requests being answered.", registry=registry
        )
        self.cancelled = Counter(
            "prunery_requests_cancelled",
            "Requests whose client went away before the answer.",
            registry=registry,
        )
        self.timed_out = Counter(
            "prunery_requests_timed_out", "Requests past their time.", ["model"], registry=registry
        )
        self.refused = Counter(
            "prunery_requests_refused",
            "Requests refused because too much waited.",
            ["model"],
            registry=registry,
        )
        self.load_seconds = Gauge(
            "prunery_model_load_seconds",
            "Loading and warming up.",
            ["model"],
            registry=registry,
        )
        self._passages = Counter(
            "prunery_passages", "Passages scored.", ["model"], registry=registry
        )
        self._failed = Counter(
            "prunery_passages_failed", "Passages without a score.", ["model"], registry=registry
        )
        self._tokens = Counter(
            "prunery_tokens",
            "Tokens run, without padding; its rate is tokens per second.",
            ["model"],
            registry=registry,
        )
        self._padding = Counter(
            "prunery_padding_tokens", "Padding run.", ["model"], registry=registry
        )
        self._model_seconds = Counter(
            "prunery_model_seconds",
            "Time in the network, all workers.",
            ["model"],
            registry=registry,
        )
        self._rows = Histogram(
            "prunery_batch_rows", "Rows of a batch.", ["model"], buckets=ROWS, registry=registry
        )
        self._queued_tokens = Gauge(
            "prunery_queue_tokens", "Tokens waiting.", ["model"], registry=registry
        )
        self._queued = Gauge(
            "prunery_queue_requests", "Requests waiting or run.", ["model"], registry=registry
        )

    def count(self, by: int) -> None:
        """A request came (1) or ended (-1)."""
        self.in_flight += by
        self._running.set(self.in_flight)

    def of_model(self, name: str) -> ModelMetrics:
        """The series of one model."""
        return ModelMetrics(self, name)

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)


class ModelMetrics:
    """The series of one model, looked up once; a `batching.Observer`."""

    def __init__(self, metrics: Metrics, name: str) -> None:
        self._tokens = metrics._tokens.labels(name)
        self._padding = metrics._padding.labels(name)
        self._model_seconds = metrics._model_seconds.labels(name)
        self._rows = metrics._rows.labels(name)
        self._queued_tokens = metrics._queued_tokens.labels(name)
        self._queued = metrics._queued.labels(name)
        self._passages = metrics._passages.labels(name)
        self._failed = metrics._failed.labels(name)
        self.timed_out = metrics.timed_out.labels(name)
        self.refused = metrics.refused.labels(name)
        self.load_seconds = metrics.load_seconds.labels(name)

    def batch(self, rows: int, tokens: int, cells: int, seconds: float) -> None:
        """A batch was run."""
        self._rows.observe(rows)
        self._tokens.inc(tokens)
        self._padding.inc(cells - tokens)
        self._model_seconds.inc(seconds)

    def queue(self, requests: int, tokens: int) -> None:
        """What waits now."""
        self._queued.set(requests)
        self._queued_tokens.set(tokens)

    def scored(self, passages: int, failed: int) -> None:
        """A request's passages were scored."""
        self._passages.inc(passages)
        if failed:
            self._failed.inc(failed)
