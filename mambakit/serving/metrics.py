"""The server's Prometheus series."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_FIRST = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)


class Metrics:
    """The series of one server; their label ``replica`` is the replica's number, "" where none had the request yet."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()

        def labels(*more: str) -> dict:
            return {"labelnames": ("replica", *more), "registry": registry}

        self.requests = Counter(
            "mambakit_requests",
            "Texts by outcome: stop, length, cancelled (the client disconnected), failed (an error, the replica died, "
            "or the server stopped); and requests not accepted: rejected (the queue is full, or no replica is ready), "
            "invalid",
            **labels("outcome"),
        )
        self.prompt_tokens = Counter("mambakit_prompt_tokens", "Tokens of the prompts of ended texts", **labels())
        self.cached_tokens = Counter("mambakit_cached_tokens", "Prompt tokens found in the prefix cache", **labels())
        self.lookups = Counter(
            "mambakit_prefix_cache_lookups",
            "Prompts of ended texts, by whether the prefix cache knew a beginning of them: hit, miss",
            **labels("outcome"),
        )
        self.tokens = Counter("mambakit_generated_tokens", "Tokens generated", **labels())
        self.first = Histogram(
            "mambakit_time_to_first_token_seconds", "From the request to its first token", buckets=_FIRST, **labels()
        )
        self.each = Histogram(
            "mambakit_time_per_token_seconds",
            "Mean time between the tokens of a text after the first",
            buckets=_TOKEN,
            **labels(),
        )
        self.waiting = Gauge("mambakit_waiting_requests", "Texts that wait for a slot", registry=registry)
        self.waiting_by_key = Gauge(
            "mambakit_waiting_texts", "Texts that no replica has yet, by key (a hash; empty without keys)", ["key"],
            registry=registry,
        )  # fmt: skip
        self.states = Gauge("mambakit_states", "States that are kept, by key", ["key"], registry=registry)
        self.state_bytes = Gauge(
            "mambakit_state_bytes", "Bytes of states that are kept, by key", ["key"], registry=registry
        )
        self.busy = Gauge("mambakit_busy_rows", "Slots in use", **labels())
        self.up = Gauge("mambakit_replica_up", "1 where the replica is ready", **labels())
        self.restarts = Counter("mambakit_replica_restarts", "Restarts of the replica", **labels())

    def ended(
        self, replica: str, outcome: str, prompt_tokens: int = 0, cached_tokens: int = 0, each: float | None = None
    ) -> None:
        self.requests.labels(replica, outcome).inc()
        self.prompt_tokens.labels(replica).inc(prompt_tokens)
        self.cached_tokens.labels(replica).inc(cached_tokens)
        if prompt_tokens:
            self.lookups.labels(replica, "hit" if cached_tokens else "miss").inc()
        if each is not None:
            self.each.labels(replica).observe(each)

    def set_states(self, kept: dict[str, tuple[int, int]]) -> None:
        """``kept``: states and their bytes, by the name of the key."""
        for gauge, part in ((self.states, 0), (self.state_bytes, 1)):
            gauge.clear()
            for key, values in kept.items():
                gauge.labels(key).set(values[part])

    def set_waiting_by_key(self, waiting: dict) -> None:
        self.waiting_by_key.clear()
        for key, texts in waiting.items():
            self.waiting_by_key.labels(str(key)).set(texts)

    def text(self) -> bytes:
        return generate_latest(self.registry)
