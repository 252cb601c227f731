"""Prometheus metrics of an engine, its cache and its server, under vLLM's names where it has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..engine import Engine
    from ..engine.stats import Histogram as Durations
    from ..stats import CacheStats

__all__ = ["Metrics", "merged"]

_EVERY = 5  # of an engine's 20 bounds a decade
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)
_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)
_CACHE_BYTES = {
    "in_use": "of sequences that go on",
    "parked": "that only released sequences had, still mapped for the next",
    "free": "kept for the next request",
    "index": "of stored prefixes",
}
_CALLS = ("create", "release", "map", "unmap", "set_access", "copy", "zero")


class Metrics:
    """What ``/metrics`` shows. Figures of the engine and its cache are read when they are asked for.

    Args:
        engine: and its cache.
        model_name: a label of each metric, as vLLM's.
    """

    def __init__(self, engine: Engine, model_name: str = "") -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine, model_name))
        ProcessCollector(registry=self._registry)
        model = {"model_name": model_name}
        registry = self._registry

        def histogram(name: str, told: str, buckets: Iterable[float]) -> Histogram:
            found = Histogram(f"vattn:{name}", told, list(model), buckets=tuple(buckets), registry=registry)
            return found.labels(**model)

        self._seconds = histogram("e2e_request_latency_seconds", "From a request to the end of its answer.", _SECONDS)
        self._prompt_tokens = histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._new_tokens = histogram("request_generation_tokens", "Tokens of all answers to a request.", _TOKENS)
        self._n = histogram("request_params_n", "Answers that a request asks for.", (1, 2, 5, 10, 20))
        prompt = Counter("vattn:prompt_tokens", "Tokens of prompts.", list(model), registry=registry)
        self._num_prompt_tokens = prompt.labels(**model)
        self._ends = Counter(
            "vattn:request_success", "Answers by how they ended.", ["model_name", "finished_reason"], registry=registry
        )
        self._responses = Counter(
            "vattn:http_requests", "Responses by route and status.", ["handler", "status"], registry=registry
        )
        self._model_name = model_name

    def observe_request(
        self, *, num_prompt_tokens: int, num_new_tokens: int, finish_reasons: Iterable[str | None], seconds: float
    ) -> None:
        """A request has come to its end.

        Args:
            num_prompt_tokens: of its prompt.
            num_new_tokens: of all its answers.
            finish_reasons: of each; None for ``"cancelled"``.
            seconds: since it came in.
        """
        reasons = [reason or "cancelled" for reason in finish_reasons]
        self._seconds.observe(seconds)
        self._prompt_tokens.observe(num_prompt_tokens)
        self._new_tokens.observe(num_new_tokens)
        self._n.observe(len(reasons))
        self._num_prompt_tokens.inc(num_prompt_tokens)
        for reason in reasons:
            self._ends.labels(self._model_name, reason).inc()

    def observe_response(self, handler: str, status: int) -> None:
        """A response was begun.

        Args:
            handler: its route; one name for all paths that are none, as each name is kept for ever.
            status: of HTTP.
        """
        self._responses.labels(handler, str(status)).inc()

    def render(self) -> tuple[bytes, str]:
        """The text of Prometheus, and its content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _EngineCollector(Collector):
    """Turns the statistics of an engine into metrics."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine, self._labels = engine, {"model_name": model_name}

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield self._gauge("num_requests_running", "Answers that have a slot.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Answers that wait for a slot.", stats.num_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the memory limit in use; 1 is all.", stats.kv_usage)
        yield self._gauge("tokens_per_second", "Tokens reported, over the last ten seconds.", stats.tokens_per_s)
        yield self._counter("generation_tokens", "Tokens reported.", stats.num_decode_tokens)
        yield self._counter("prefill_tokens", "Rows that passes of prompts computed.", stats.num_prefill_tokens)
        yield self._counter("num_preemptions", "Times that an answer gave its memory back.", stats.num_preemptions)
        yield self._counter("engine_steps", "Steps of the engine.", stats.num_steps)
        told = "Tokens whose rows were looked for among stored prefixes."
        yield self._counter("prefix_cache_queries", told, stats.num_prefix_queries)
        told = "Tokens whose rows were found among stored prefixes."
        yield self._counter("prefix_cache_hits", told, stats.num_prefix_hits)
        yield self._durations("time_to_first_token_seconds", "To an answer's first token.", stats.first_token_s)
        told = "From one token of an answer to its next."
        yield self._durations("inter_token_latency_seconds", told, stats.between_tokens_s)
        yield self._durations("request_queue_time_seconds", "Until an answer has a slot.", stats.queue_s)
        with suppress(ConfigError):  # the cache is closed
            yield from self._of_cache(self._engine.cache.stats())

    def _of_cache(self, cache: CacheStats) -> Iterator[Metric]:
        yield self._gauge("cache_limit_bytes", "Memory that pages may take.", cache.memory_limit_bytes)
        yield self._gauge("cache_page_bytes", "Size of a page.", cache.page_bytes)
        yield self._gauge("cache_physical_bytes", "Memory that pages take.", cache.physical_bytes)
        yield self._gauge("cache_row_bytes", "Rows of live sequences.", cache.row_bytes)
        yield self._gauge("cache_waste_bytes", "Mapped for live sequences beyond their rows.", cache.waste_bytes)
        yield self._gauge("cache_shared_bytes", "Pages of two or more sequences, once each.", cache.shared_bytes)
        yield self._gauge("cache_live_slots", "Slots that own a sequence.", cache.num_live_slots)
        yield self._gauge("cache_max_slots", "Slots that there are.", self._engine.cache.max_slots)
        kinds = GaugeMetricFamily("vattn:cache_bytes", "Pages by what has them.", labels=[*self._labels, "kind"])
        for kind in _CACHE_BYTES:
            kinds.add_metric([*self._labels.values(), kind], getattr(cache, f"{kind}_bytes"))
        yield kinds
        calls = CounterMetricFamily("vattn:cache_driver_calls", "Calls of the driver.", labels=[*self._labels, "call"])
        for call in _CALLS:
            calls.add_metric([*self._labels.values(), call], getattr(cache, f"num_{call}"))
        yield calls
        yield self._counter("cache_adopted_pages", "Parked pages that a sequence took over.", cache.num_adopted)
        yield self._counter("cache_out_of_pages", "Times that memory was short.", cache.num_oom)

    def _gauge(self, name: str, told: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vattn:{name}", told, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, told: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vattn:{name}", told, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _durations(self, name: str, told: str, durations: Durations) -> Metric:
        buckets, seen = [], 0
        for i, count in enumerate(durations.counts):
            seen += count
            if i == len(durations.bounds):
                buckets.append(("+Inf", seen))
            elif i % _EVERY == 0:
                buckets.append((f"{durations.bounds[i]:.4g}", seen))
        family = HistogramMetricFamily(f"vattn:{name}", told, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), buckets, durations.sum)
        return family


def merged(texts: Mapping[str, bytes]) -> bytes:
    """The metrics of several servers as one text, with the server's name as the label ``replica``."""
    registry = CollectorRegistry()
    registry.register(_Merged(texts))
    return generate_latest(registry)


class _Merged(Collector):
    def __init__(self, texts: Mapping[str, bytes]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, text in self._texts.items():
            for found in text_string_to_metric_families(text.decode()):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, {**sample.labels, "replica": name}, sample.value)
        yield from families.values()
