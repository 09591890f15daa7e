"""/metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from serving.engine import Engine

PATHS = (
    "/v1/models",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/completions",
    "/v1/embeddings",
    "/health",
    "/metrics",
)


class Metrics:
    """Counters of requests and the engine's own numbers, in their own registry."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        self._requests = Counter(
            "minimind_requests", "HTTP requests by path and status", ["path", "status"], registry=self.registry
        )
        waited = Histogram(
            "minimind_queue_seconds",
            "Time that sequences waited for a row",
            buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
            registry=self.registry,
        )
        engine.statistics.on_joined = waited.observe
        self.registry.register(self)

    def count(self, path: str, status: int) -> None:
        known = path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._requests.labels(known, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's numbers as they are now."""
        engine, totals = self.engine, self.engine.statistics
        yield GaugeMetricFamily("minimind_rows_running", "Sequences in the batch", engine.running)
        yield GaugeMetricFamily("minimind_rows_limit", "Sequences that the batch can hold", engine.rows)
        yield GaugeMetricFamily("minimind_queue_waiting", "Sequences and texts that wait", engine.waiting)
        yield GaugeMetricFamily("minimind_queue_limit", "Sequences and texts that may wait", engine.max_queue)
        yield CounterMetricFamily("minimind_prompt_tokens", "Prompt tokens read", totals.prompt_tokens)
        yield CounterMetricFamily("minimind_generated_tokens", "Tokens generated", totals.generated_tokens)
        yield CounterMetricFamily("minimind_steps", "Steps of the batch", totals.steps)
        yield CounterMetricFamily(
            "minimind_cancelled", "Sequences dropped because their client disconnected", totals.cancelled
        )
        yield CounterMetricFamily("minimind_failures", "Steps that failed", totals.failures)
