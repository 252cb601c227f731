"""A server's day in minutes: requests come, grow, fork, are cut and go, and nothing may pile up.

``python tests/soak.py --minutes 20`` prints a line every ten seconds. For it the traffic stops and all memory is given
back, so that what is left is what leaks. At the end the last third of the lines is held against the middle third.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

import vattn

NUM_SLOTS, BUSY, CALM, LIMIT_PAGES = 16, 15, 5, 110  # BUSY requests want about 170 pages, CALM ones 55
ROUNDS_OF_LOAD = 300  # then it changes from busy to calm or back
# By what factor, and how much beyond it, the median of the last third may exceed that of the middle third.
TOLERANCES: dict[str, tuple[float, float]] = {
    "MiB resident": (1.0, 4.0),
    "descriptors": (1.0, 0.0),
    "mappings": (1.0, 20.0),
    "handles": (1.0, 0.0),
    "objects": (1.0, 200.0),
    "us ensure p50": (1.3, 2.0),
    "us release p50": (1.3, 10.0),
}


@dataclass(eq=False)
class Request:
    slot: int
    rows: int
    end: int
    written: dict[int, float] = field(default_factory=dict)  # row -> what it must read


class Clock:  # the newest 65,536 calls of a kind, in memory that is taken once
    def __init__(self) -> None:
        self.seconds, self.count = np.zeros(1 << 16), 0

    def __call__(self, call: Callable[..., None], *arguments: int) -> None:
        start = time.perf_counter()
        call(*arguments)
        self.seconds[self.count % len(self.seconds)] = time.perf_counter() - start
        self.count += 1

    def us(self, percent: int) -> float:
        return float(np.percentile(self.seconds[: self.count], percent)) * 1e6 if self.count else 0.0


class Server:
    def __init__(self, device: str, seed: int) -> None:
        unit = 1 if device == "cpu" else 32  # a page holds 32 tokens: 64 KiB on the CPU, 2 MiB on a GPU
        layout = vattn.KVLayout(2, 2, 64 * unit, 2048, torch.float32)
        page_bytes = 32 * layout.bytes_per_token
        self.cache = vattn.KVCache(layout, NUM_SLOTS, device, LIMIT_PAGES * page_bytes, page_bytes=page_bytes)
        self.random = random.Random(seed)
        self.requests: list[Request] = []  # the oldest first
        self.ensure, self.release = Clock(), Clock()
        self.operations = self.rounds = self.tag = 0

    def tensors(self, request: Request) -> list[torch.Tensor]:
        return [tensor for layer in range(2) for tensor in self.cache.rows(request.slot, layer)]

    def write(self, request: Request, *rows: int) -> None:
        for row in rows:
            self.tag = self.tag % 1_000_000 + 1  # exact in float32
            request.written[row] = float(self.tag)
            for tensor in self.tensors(request):
                tensor[row] = self.tag

    def grow(self, request: Request, rows: int) -> bool:
        """False where there is no memory."""
        self.operations += 1
        try:
            self.ensure(self.cache.ensure, request.slot, rows)
        except vattn.OutOfPages:
            return False
        request.rows = rows
        return True

    def end(self, request: Request) -> None:
        rows, values = (torch.tensor([*each]) for each in (request.written, request.written.values()))
        for tensor in self.tensors(request):
            read = tensor[rows.long().to(tensor.device)].cpu()
            assert (read == values[:, None, None]).all(), f"slot {request.slot}: rows are not as they were written"
        self.requests.remove(request)
        self.operations += 1
        self.release(self.cache.release, request.slot)

    def admit(self) -> None:
        prompt = min(1400, 1 + int(self.random.lognormvariate(5.3, 0.8)))  # a median of 200 tokens
        end = prompt + min(600, 1 + int(self.random.lognormvariate(4.6, 0.8)))  # and of 100
        request = Request(self.cache.acquire(expect_len=end), 0, end)
        self.requests.append(request)
        if self.grow(request, prompt):
            self.write(request, 0, self.random.randrange(prompt), prompt - 1)
        else:
            self.end(request)

    def fork(self, parent: Request) -> None:
        self.operations, rows = self.operations + 1, self.random.randint(0, parent.rows)
        with suppress(vattn.OutOfPages):
            slot = self.cache.fork(parent.slot, rows)
            self.requests.append(Request(slot, rows, parent.end, {k: v for k, v in parent.written.items() if k < rows}))

    def truncate(self, request: Request) -> None:
        self.operations += 1
        request.rows = max(0, request.rows - self.random.choice([1, 4, 100]))
        request.written = {k: v for k, v in request.written.items() if k < request.rows}
        self.cache.truncate(request.slot, request.rows)

    def round(self) -> None:
        """One may come, all grow by a token, some end, one may fork or be cut."""
        self.rounds += 1
        wanted = CALM if self.rounds // ROUNDS_OF_LOAD % 2 else BUSY
        if len(self.requests) < wanted and self.random.random() < 0.3:
            self.admit()
        for request in tuple(self.requests):
            while request in self.requests and not self.grow(request, request.rows + 1):
                self.end(self.requests[-1])  # the newest makes room, if need be the one that wants it
        with self.cache.step([request.slot for request in self.requests]):
            for request in self.requests:
                if self.random.random() < 0.02:
                    self.write(request, request.rows - 1)
        for request in [request for request in self.requests if request.rows >= request.end]:
            self.end(request)
        if self.requests and len(self.requests) < wanted and self.random.random() < 0.05:
            self.fork(self.random.choice(self.requests))
        if self.requests and self.random.random() < 0.1:
            self.truncate(self.random.choice(self.requests))  # as speculation does that failed
        if self.random.random() < 0.001:
            self.cache.check_integrity()

    def run(self, seconds: float) -> dict[str, float]:
        """Serve for so long, let what is live end, and look at what is left: one line."""
        self.operations = self.ensure.count = self.release.count = 0
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            self.round()
        line: dict[str, float] = {"operations": self.operations, "operations/s": self.operations / seconds}
        for request in tuple(self.requests):
            self.end(request)
        self.cache.check_integrity()
        self.cache.trim()
        gc.collect()
        line["MiB resident"] = int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) / 1024
        line["descriptors"] = len(os.listdir("/proc/self/fd"))
        line["mappings"] = Path("/proc/self/maps").read_text().count("\n")
        line["handles"] = self.cache.stats().num_create - self.cache.stats().num_release
        line["objects"] = len(gc.get_objects())
        for name, clock in (("ensure", self.ensure), ("release", self.release)):
            line |= {f"us {name} p{percent}": clock.us(percent) for percent in (50, 99)}
        return line


def what_grew(lines: list[dict[str, float]], tolerances: dict[str, tuple[float, float]] = TOLERANCES) -> list[str]:
    """A sentence for everything whose median in the last third exceeds that of the middle third by too much."""
    third = len(lines) // 3
    assert third, f"{len(lines)} lines are too few to tell: run it longer"
    grew = []
    for name, (factor, more) in tolerances.items():
        values = [line[name] for line in lines]
        middle, last = statistics.median(values[-2 * third : -third]), statistics.median(values[-third:])
        if last > middle * factor + more:
            grew.append(f"{name} grew from {middle:.1f} to {last:.1f}; tolerated: {factor} times that, and {more} more")
    return grew


def main(arguments: list[str] | None = None, line_seconds: float = 10.0, tolerances: dict = TOLERANCES) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=1)
    options, lines = parser.parse_args(arguments), list[dict[str, float]]()
    server = Server(options.device, options.seed)
    with server.cache as cache:
        while len(lines) * line_seconds < options.minutes * 60:
            lines.append(server.run(line_seconds))
            print(", ".join(f"{round(value, 1):.8g} {name}" for name, value in lines[-1].items()), flush=True)
        stats = cache.stats()
        print(f"{server.rounds} rounds, {stats.num_oom} times out of pages, {stats.num_unparked} pages unparked")
    grew = what_grew(lines, tolerances)
    print("\n".join(grew) or "nothing grew")
    return 1 if grew else 0


if __name__ == "__main__":
    raise SystemExit(main())
