"""/metrics, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
SHORT_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)


class Metrics:
    """Counters of requests and the engine's own numbers, in their own registry."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.registry = engine, CollectorRegistry()
        self._requests = Counter(
            "minimind_requests", "HTTP requests by path and status", ["path", "status"], registry=self.registry
        )
        statistics = engine.statistics
        statistics.on_joined = self._histogram("queue", "Time in the queue", BUCKETS)
        statistics.on_first_token = self._histogram("time_to_first_token", "Time until the first token", BUCKETS)
        statistics.on_next_token = self._histogram("inter_token", "Time between two tokens of an answer", SHORT_BUCKETS)
        self.registry.register(self)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Callable[[float], None]:
        return Histogram(f"minimind_{name}_seconds", text, buckets=buckets, registry=self.registry).observe

    def count(self, path: str, status: int) -> None:
        """Count a request that was answered with a status."""
        known = path if path in PATHS else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._requests.labels(known, str(status)).inc()

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's numbers as they are now."""
        engine, totals = self.engine, self.engine.statistics
        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        for kind, name, text, value in (
            (gauge, "rows_running", "Sequences in the batch", engine.running),
            (gauge, "rows_limit", "Sequences that the batch can hold", engine.rows),
            (gauge, "queue_waiting", "Answers, and requests with texts, that wait", engine.waiting),
            (gauge, "queue_limit", "Answers, and requests with texts, that may wait", engine.max_queue),
            (counter, "prompt_tokens", "Tokens of prompts and texts", totals.prompt_tokens),
            (counter, "prefix_cache_hit_tokens", "Prompt tokens that the prefix cache had", totals.cached_tokens),
            (gauge, "prefix_cache_bytes", "Memory of the prefix cache", engine.prefix_bytes),
            (counter, "generated_tokens", "Tokens generated", totals.generated_tokens),
            (counter, "steps", "Steps of the batch", totals.steps),
            (counter, "cancelled", "Sequences dropped because their client disconnected", totals.cancelled),
            (counter, "failures", "Steps that failed", totals.failures),
        ):
            yield kind(f"minimind_{name}", text, value)
