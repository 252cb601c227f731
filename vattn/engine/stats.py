"""What an engine has done: counts, rates and histograms, kept up in constant time."""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

from ..stats import CacheStats

__all__ = ["EngineStats", "Histogram", "Meters"]

_PER_DECADE = 20
_BOUNDS = tuple(10 ** (i / _PER_DECADE - 4) for i in range(7 * _PER_DECADE + 1))  # 0.1 ms to 1,000 s
_RATE_S = 10.0  # over which a rate is averaged


@dataclass(frozen=True)
class Histogram:
    """How often a duration fell where.

    Attributes:
        bounds: seconds, rising.
        counts: one more than bounds: ``counts[i]`` of at most ``bounds[i]`` and above the bound before it; the last
            counts durations above the last bound.
        sum: of all durations, seconds.
        count: of all.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float
    count: int

    def __repr__(self) -> str:
        p50, p99 = self.quantile(0.5), self.quantile(0.99)
        return f"Histogram(count={self.count}, mean={self.mean:.3g}, p50={p50:.3g}, p99={p99:.3g})"

    def quantile(self, q: float) -> float:
        """A duration that a share ``q`` of all do not exceed, exact to the width of a bound's step; 0 of none."""
        wanted, seen = q * self.count, 0
        for i, count in enumerate(self.counts):
            if count and seen + count >= wanted:
                if i == len(self.bounds):
                    return self.bounds[-1]
                low = self.bounds[i - 1] if i else 0.0
                return low + (self.bounds[i] - low) * max(0.0, wanted - seen) / count
            seen += count
        return 0.0

    @property
    def mean(self) -> float:
        """Seconds; 0 of none."""
        return self.sum / self.count if self.count else 0.0


@dataclass(frozen=True)
class EngineStats:
    """A snapshot.

    Attributes:
        num_waiting, num_running: samples.
        num_prefill_tokens: rows computed by prefill passes, what preemption made necessary again included.
        num_decode_tokens: tokens reported.
        num_steps: calls of ``step``, but for those that launched nothing, as a pass of prompts went on.
        num_preemptions: times that a sample gave its memory back to others.
        num_prefix_queries, num_prefix_hits: tokens of prompts (and of answers, after a preemption) that rows were
            looked up for before they were computed, and those of them whose rows were there. Further samples of a
            request do not count, which share its prompt anyway.
        index_bytes: memory that only sequences which have ended hold, for their prefixes; as good as free.
        tokens_per_s: tokens reported, over the last ten seconds or so.
        kv_usage: share of the cache's memory limit that live sequences use.
        first_token_s: from ``submit`` to a sample's first token.
        between_tokens_s: from one token of a sample to its next.
        queue_s: from ``submit`` until a sample was first given a slot.
    """

    num_waiting: int
    num_running: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_steps: int
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int
    index_bytes: int
    tokens_per_s: float
    kv_usage: float
    first_token_s: Histogram
    between_tokens_s: Histogram
    queue_s: Histogram


class _Counts:
    """A histogram in the making."""

    def __init__(self) -> None:
        self._counts, self._sum, self._count = [0] * (len(_BOUNDS) + 1), 0.0, 0

    def add(self, seconds: float, times: int = 1) -> None:
        self._counts[bisect_left(_BOUNDS, seconds)] += times
        self._sum += seconds * times
        self._count += times

    def snapshot(self) -> Histogram:
        return Histogram(_BOUNDS, tuple(self._counts), self._sum, self._count)


@dataclass
class Meters:
    """What ``EngineStats`` is made of."""

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    first_token_s: _Counts = field(default_factory=_Counts)
    between_tokens_s: _Counts = field(default_factory=_Counts)
    queue_s: _Counts = field(default_factory=_Counts)
    _recent: float = 0.0  # tokens, each worth less the longer ago
    _began_s: float | None = None
    _noted_s: float = 0.0

    def note_tokens(self, count: int, now: float) -> None:
        if self._began_s is None:
            self._began_s = self._noted_s = now
        self._recent = self._faded(now) + count
        self._noted_s = now
        self.num_decode_tokens += count

    def _faded(self, now: float) -> float:
        return self._recent * math.exp((self._noted_s - now) / _RATE_S)

    def snapshot(self, num_waiting: int, num_running: int, cache: CacheStats | None, now: float) -> EngineStats:
        rate = 0.0
        if self._began_s is not None and now > self._began_s:
            rate = self._faded(now) / (_RATE_S * -math.expm1((self._began_s - now) / _RATE_S))
        return EngineStats(
            num_waiting,
            num_running,
            self.num_prefill_tokens,
            self.num_decode_tokens,
            self.num_steps,
            self.num_preemptions,
            self.num_prefix_queries,
            self.num_prefix_hits,
            0 if cache is None else cache.index_bytes,
            rate,
            0.0 if cache is None else cache.in_use_bytes / cache.memory_limit_bytes,
            self.first_token_s.snapshot(),
            self.between_tokens_s.snapshot(),
            self.queue_s.snapshot(),
        )
