"""The host driver with streams on which nothing runs until somebody waits: stream hazards show without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from vattn.driver import Fence, HostDriver


def _nothing() -> None:
    pass


@dataclass
class _Stream:
    queue: list[Callable[[], None]] = field(default_factory=list)
    num_done: int = 0


class _Fence:
    def __init__(self, driver: StreamDriver, stream: int, position: int) -> None:
        self.driver, self.stream, self.position = driver, stream, position

    def done(self) -> bool:
        return self.driver.streams[self.stream].num_done >= self.position

    def wait(self) -> None:
        self.driver.num_waits += not self.done()
        self.driver.run(self.stream, self.position)


class StreamDriver(HostDriver):
    """Work is queued on the current stream, and runs only when a fence behind it is waited for, or ``run`` is called.

    Attributes:
        num_waits: how often the host had to wait for work that had not run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.streams: dict[int, _Stream] = {0: _Stream()}
        self.current = 0
        self._numbers: dict[int, int] = {}  # of streams whose handle was another's
        self.num_waits = 0

    @contextmanager
    def stream(self, number: int) -> Iterator[None]:
        """Make another stream the current one."""
        before, self.current = self.current, self._numbers.get(number, number)
        self.streams.setdefault(self.current, _Stream())
        try:
            yield
        finally:
            self.current = before

    def destroy(self, number: int) -> None:
        """Its work goes on; the next stream that is made has its handle, and is another."""
        self._numbers[number] = 1000 + len(self.streams)

    def launch(self, work: Callable[[], None]) -> None:
        """Queue what a kernel would do."""
        self.streams[self.current].queue.append(work)

    def run(self, stream: int, position: int | None = None) -> None:
        """Run a stream's work up to ``position``; None: all of it."""
        state = self.streams[stream]
        position = len(state.queue) if position is None else position
        while state.num_done < position:
            work, state.queue[state.num_done] = state.queue[state.num_done], _nothing  # what ran holds no tensors
            work()
            state.num_done += 1

    def _zero(self, address: int, size_bytes: int) -> None:
        self.launch(lambda: HostDriver._zero(self, address, size_bytes))

    def _copy(self, target: int, source: int, size_bytes: int) -> None:
        self.launch(lambda: HostDriver._copy(self, target, source, size_bytes))

    def fence(self) -> Fence:
        return _Fence(self, self.current, len(self.streams[self.current].queue))

    def order_after(self, fence: Fence) -> None:
        if fence.stream != self.current:
            self.launch(fence.wait)

    def synchronize(self) -> None:
        for stream in self.streams:
            self.run(stream)
