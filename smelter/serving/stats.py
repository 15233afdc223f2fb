"""What `GET /metrics` tells, in Prometheus's text format: requests, tokens, the queue, and how long things take."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from smelter.decoding import End
from smelter.serving.engines import AnyEngine

BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class _EngineCollector(Collector):
    """Reads the engine's own counts when they are asked for."""

    def __init__(self, engine: AnyEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Every figure of the engine."""
        engine, counts = self.engine, self.engine.counts
        yield GaugeMetricFamily("smelter_slots", "Requests that are decoded together, at most.", engine.num_slots)
        yield GaugeMetricFamily("smelter_active_slots", "Requests in work.", engine.num_active)
        yield GaugeMetricFamily("smelter_queue", "Requests that wait.", engine.num_waiting)
        totals = {
            "smelter_prompt_tokens": ("Prompt tokens read.", counts.prompt_tokens),
            "smelter_cached_tokens": ("Prompt tokens found in the cache.", counts.cached_tokens),
            "smelter_tokens": ("Tokens written.", counts.tokens),
            "smelter_steps": ("Steps of the decoder.", counts.steps),
            "smelter_cancelled": ("Answers that nobody waited for.", counts.cancelled),
            "smelter_prompt_seconds": ("Time spent reading prompts.", counts.prompt_seconds),
            "smelter_decode_seconds": ("Time spent decoding.", counts.decode_seconds),
        }
        for name, (text, value) in totals.items():
            yield CounterMetricFamily(name, text, value)


class Stats:
    """The figures of one server."""

    def __init__(self, engine: AnyEngine | None = None) -> None:
        self._registry = CollectorRegistry()
        if engine is not None:
            self._registry.register(_EngineCollector(engine))
        self._requests = Counter("smelter_requests", "HTTP requests.", ["route", "status"], registry=self._registry)
        self._seconds = self._histogram("smelter_request_seconds", "From the request to its last byte.", ["route"])
        self._first = self._histogram("smelter_first_token_seconds", "From the request to its first token.")
        self._wait = self._histogram("smelter_queue_seconds", "Time in the queue.")

    def _histogram(self, name: str, text: str, labels: list[str] | None = None) -> Histogram:
        return Histogram(name, text, labels or [], buckets=BUCKETS, registry=self._registry)

    def note_request(self, route: str, status: int, seconds: float) -> None:
        """An HTTP request is done; status 0 where the client went away."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def note_end(self, end: End) -> None:
        """An answer has ended."""
        self._wait.observe(end.wait_seconds)
        if end.num_tokens:
            self._first.observe(end.wait_seconds + end.prompt_seconds)

    def text(self) -> bytes:
        """The page for Prometheus."""
        return generate_latest(self._registry)
