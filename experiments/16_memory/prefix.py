"""Requests that share the beginning of their prompts, timed from outside; no system is imported here."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol

sys.path.insert(0, str(Path(__file__).parents[1] / "13_serving"))
import workload

SALTS = ("a", "b")  # of two tenants


class System(workload.System, Protocol):
    def with_salt(self, salt: str | None) -> workload.System:
        """The same for a tenant, who shares with nobody of another salt."""
        ...


@dataclass(frozen=True)
class Case:
    """So many requests, each the shared tokens and its own."""

    name: str
    vocab_size: int
    shared: int
    own: int
    answer: int
    requests: int
    repeats: int = 3

    @property
    def max_seq_len(self) -> int:
        return self.shared + self.own + self.answer


CASES = {
    "8B": Case("8B", 128256, shared=4096, own=128, answer=64, requests=64),
    "tiny": Case("tiny", 500, shared=1024, own=32, answer=8, requests=16),
}


def _tokens(draw: Random, case: Case, count: int) -> list[int]:
    return [draw.randrange(10, case.vocab_size - 10) for _ in range(count)]


def measure(system: System, case: Case, kinds: Sequence[str]) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """(case, metric -> samples). The shared tokens are others each time.

    Args:
        kinds: ``cold``: nobody had them before; ``warm``: one request with them has ended; ``other-salt``: a request of
            another tenant has.
    """
    for kind in kinds:
        first, rates = [], []
        for repeat in range(case.repeats + 1):  # the first time warms up
            draw = Random(f"{kind} {repeat}")
            shared = _tokens(draw, case, case.shared)
            before, after = {"other-salt": SALTS}.get(kind, (None, None))
            if kind != "cold":
                workload.run(system.with_salt(before), [(shared + _tokens(draw, case, case.own), 2)])
            requests = [(shared + _tokens(draw, case, case.own), case.answer) for _ in range(case.requests)]
            times = workload.run(system.with_salt(after), requests)
            if repeat:
                first += [each.first * 1e3 for each in times]
                took = max(each.tokens[-1] for each in times) - min(each.begin for each in times)
                rates.append(case.requests * case.answer / took)
        name = f"prefix {case.name} shared={case.shared} requests={case.requests} {kind}"
        yield name, {"prefix_first_token": first, "prefix_tokens_per_s": rates}


UNITS = {"prefix_first_token": "ms", "prefix_tokens_per_s": "tokens/s"}
