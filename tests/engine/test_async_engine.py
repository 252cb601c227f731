"""``AsyncEngine``: streams, back-pressure, cancelling by leaving, draining, and steps that raise."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine import alone, cache_of, requests_of
from helpers.llama import small_model

import vattn
from vattn import AsyncEngine, Engine, KVCache, QueueFull, Request, Sampling, StepToken
from vattn.errors import ConfigError, OutOfPages
from vattn.models import FusedLlama, Llama


@pytest.fixture
def cache(model: Llama) -> Iterator[KVCache]:
    before = threading.active_count()
    with cache_of(model) as cache:
        yield cache
        assert cache.stats().num_live_slots == 0
        cache.check_integrity()
    assert threading.active_count() <= before + 2  # asyncio's own executor may have some


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 120))


async def collect(serving: AsyncEngine, request: Request) -> list[StepToken]:
    return [token async for token in serving.stream(request)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_streams_side_by_side(model: Llama, cache: KVCache) -> None:
    wanted = [*requests_of(6, max_new_tokens=20), Request([3, 5], 10, Sampling(1.0, seed=5), n=3)]
    expected = alone(model, wanted)

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            streams = await asyncio.gather(*(collect(serving, request) for request in wanted))
        for tokens, completions in zip(streams, expected, strict=True):
            for completion in completions:
                mine = [token for token in tokens if token.index == completion.index]
                assert tuple(token.token for token in mine) == completion.tokens
                assert [token.finish_reason for token in mine][-1] == completion.finish_reason

    with Engine(model, cache) as engine:
        run(main())
        run(main())  # another event loop, another thread, the same engine
        assert not engine.has_work


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_streams_on_the_gpu() -> None:
    model = small_model().to("cuda")
    wanted = requests_of(6, max_new_tokens=20)
    expected = [c.tokens for (c,) in alone(model, wanted)]

    async def main() -> list[list[StepToken]]:
        async with AsyncEngine(engine) as serving:
            early = serving.stream(Request([3], 400))
            await anext(early)
            await early.aclose()
            return await asyncio.gather(*(collect(serving, request) for request in wanted))

    with cache_of(model, num_pages=64) as cache, Engine(model, cache, max_step_tokens=8) as engine:
        assert [tuple(token.token for token in tokens) for tokens in run(main())] == expected
        cache.check_integrity()


def test_tokens_come_as_they_are_made(model: Llama, cache: KVCache) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            count = 0
            async for token in serving.stream(Request([3, 5], 400)):
                count += 1
                if count == 3:
                    assert engine.num_running == 1
                    assert token.finish_reason is None
                    break

    with Engine(model, cache) as engine:
        run(main())


@pytest.mark.parametrize("how", ["break", "task", "exception"])
def test_leaving_the_loop_cancels(model: Llama, cache: KVCache, how: str) -> None:
    both_run = asyncio.Event()

    async def leave(serving: AsyncEngine) -> None:
        stream = serving.stream(Request([3, 5], 500))
        async for _ in stream:
            await until(lambda: engine.num_running == 2)
            both_run.set()
            if how == "exception":
                raise KeyError("mine")
            if how == "break":
                break
        await stream.aclose()  # what the garbage collector does, later

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            other = asyncio.create_task(collect(serving, Request([7], 400)))
            task = asyncio.create_task(leave(serving))
            await both_run.wait()
            if how == "task":
                task.cancel()
            await asyncio.wait([task])
            assert how not in ("exception", "task") or task.cancelled() or isinstance(task.exception(), KeyError)
            await until(lambda: engine.num_running < 2)
            assert len(await other) == 400

    with Engine(model, cache) as engine:
        run(main())


def test_a_full_queue(model: Llama, cache: KVCache) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            results = await asyncio.gather(
                *(collect(serving, Request([i], 30)) for i in range(12)), return_exceptions=True
            )
            refused = [each for each in results if isinstance(each, QueueFull)]
            assert refused
            assert all(each.max_waiting == 2 for each in refused)
            assert all(len(each) == 30 for each in results if not isinstance(each, QueueFull))
            assert len(await collect(serving, Request([5], 3))) == 3

    with Engine(model, cache, max_batch=1, max_waiting=2) as engine:
        run(main())


def test_bad_input_is_raised_where_the_stream_begins(model: Llama, cache: KVCache) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            for bad in (Request([]), Request([999]), Request([1] * 600), 5):
                with pytest.raises(ConfigError):
                    await collect(serving, bad)  # type: ignore[arg-type]
            assert len(await collect(serving, Request([5], 3))) == 3

    with Engine(model, cache) as engine:
        run(main())
    with pytest.raises(ConfigError, match=r"takes a vattn\.Engine"):
        AsyncEngine(model)  # type: ignore[arg-type]


def test_leaving_drains(model: Llama, cache: KVCache) -> None:
    """What is under way comes to its end; nothing new is taken."""

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            tasks = [asyncio.create_task(collect(serving, request)) for request in requests_of(6, max_new_tokens=15)]
            await until(lambda: engine.num_running > 0)
        assert [len(await task) for task in tasks] == [15] * 6
        with pytest.raises(ConfigError, match="is closed"):
            await collect(serving, Request([3], 2))
        await serving.close()

    with Engine(model, cache) as engine:
        run(main())
        assert not engine.has_work


def test_closing_without_draining(model: Llama, cache: KVCache) -> None:
    async def main() -> None:
        serving = AsyncEngine(engine)
        tasks = [asyncio.create_task(collect(serving, Request([3 + i], 240))) for i in range(6)]
        await until(lambda: engine.num_running == 4)
        await serving.close(drain=False)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, ConfigError) and "was closed" in str(each) for each in results)
        engine.step()
        assert not engine.has_work

    with Engine(model, cache) as engine:
        run(main())


def test_a_stream_that_nobody_reads_does_not_hold_up_the_end(model: Llama, cache: KVCache) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            stream = serving.stream(Request([3], 20))
            first = await anext(stream)
        rest = [token async for token in stream]  # they were made all the same
        assert len([first, *rest]) == 20

    with Engine(model, cache) as engine:
        run(main())


def test_what_a_request_does_wrong_ends_its_own_stream(model: Llama, cache: KVCache) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            good, bad = await asyncio.gather(
                collect(serving, Request([3], 10)), collect(serving, Request([3], 10, allowed_tokens=lambda _: 1 / 0))
            )
            assert (len(good), len(bad), bad[0].finish_reason) == (10, 1, "error")
            assert isinstance(bad[0].error, ZeroDivisionError)

    with Engine(model, cache) as engine:
        run(main())


class Faulty(FusedLlama):
    raises: BaseException | None = None

    def decode(self, residual: torch.Tensor, batch: Any, cache: KVCache, attention: Any) -> torch.Tensor:
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        return super().decode(residual, batch, cache, attention)


def test_a_step_that_fails_ends_those_of_the_step(model: Llama, cache: KVCache) -> None:
    faulty = Faulty(model)

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            first = asyncio.create_task(collect(serving, Request([3], 400)))
            await until(lambda: engine.stats().num_decode_tokens > 3)
            faulty.raises = RuntimeError("not now")
            tokens = await first
            assert tokens[-1].finish_reason == "error"
            assert "not now" in str(tokens[-1].error)
            assert len(await collect(serving, Request([5], 4))) == 4

    with Engine(faulty, cache) as engine:
        run(main())


def test_a_step_that_raises_fails_the_streams_that_were_running(
    model: Llama, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the engine itself: those streams raise it, those that wait go on."""

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            running = asyncio.create_task(collect(serving, Request([3], 400)))
            await until(lambda: engine.num_running == 1)
            waiting = asyncio.create_task(collect(serving, Request([5], 5)))
            await until(lambda: engine.num_waiting == 1)

            def broken(now: float) -> None:
                monkeypatch.undo()
                raise ArithmeticError("a bug")

            monkeypatch.setattr(engine._runner, "advance", broken)
            with pytest.raises(ArithmeticError, match="a bug"):
                await running
            assert len(await waiting) == 5

    with Engine(model, cache, max_batch=1) as engine:
        run(main())


def test_memory_of_others_is_waited_for(model: Llama) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            task = asyncio.create_task(collect(serving, Request([3] * 40, 5)))
            await asyncio.sleep(0.1)
            assert not task.done()
            cache.release(other)
            assert len(await task) == 5

    with cache_of(model, num_pages=6) as cache, Engine(model, cache) as engine:
        other = cache.acquire()
        cache.ensure(other, 64)
        with pytest.raises(OutOfPages):
            engine.generate([Request([3] * 40, 5)])
        run(main())


def test_an_event_loop_that_ends_early_leaves_the_engine_to_others(model: Llama, cache: KVCache) -> None:
    serving_of: list[AsyncEngine] = []

    async def abandon() -> None:
        serving_of.append(AsyncEngine(engine))
        stream = serving_of[0].stream(Request([3], 500))
        await anext(stream)

    async def go_on() -> None:
        assert len(await collect(serving_of[0], Request([5], 7))) == 7
        await serving_of[0].close()

    with Engine(model, cache) as engine:
        asyncio.run(abandon())
        run(go_on())


# -- ends that nobody planned ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["while it runs", "while it waits", "by its own callback"])
def test_a_request_that_somebody_cancels_by_its_id_ends_its_stream(model: Llama, cache: KVCache, how: str) -> None:
    """The stream waited for ever, and so did ``close``."""
    ids: list[int] = []

    def allowed(answer: Any) -> Any:
        if len(answer) == 5:
            serving_of[0].engine.cancel(1)
        return torch.ones(128, dtype=torch.bool).numpy()

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            serving_of.append(serving)
            other = asyncio.create_task(collect(serving, Request([7], 300)))
            await until(lambda: engine.num_running == 1)
            its_own = how == "by its own callback"
            task = asyncio.create_task(
                collect(serving, Request([3, 5], 400, n=3, allowed_tokens=allowed if its_own else None))
            )
            await until(lambda: engine.num_waiting + engine.num_running > 1)
            if not its_own:
                await asyncio.to_thread(serving.engine.cancel, 1)
            tokens = await task
            assert all(token.finish_reason is None for token in tokens)
            ids.extend(token.request_id for token in tokens)
            assert len(await other) == 300

    serving_of: list[AsyncEngine] = []
    with Engine(model, cache, max_batch=1 if how == "while it waits" else 4) as engine:
        run(main())
        assert not engine.has_work
    assert set(ids) <= {1}


def test_leaving_early_leaves_nothing_behind(model: Llama, cache: KVCache) -> None:
    """22 of 30 times a sample still ran: its cancellation was posted and nobody stepped any more."""

    async def main() -> None:
        async with asyncio.timeout(0.02), AsyncEngine(engine) as serving:
            await collect(serving, Request([5, 6], 400))

    with Engine(model, cache) as engine:
        for _ in range(20):
            with pytest.raises(TimeoutError):
                run(main())
            assert (engine.has_work, engine.num_running) == (False, 0)
            assert cache.stats().num_live_slots == 1  # the decode loop's


def test_an_open_one_has_the_engine_to_itself(model: Llama, cache: KVCache) -> None:
    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            for _ in range(2):  # before its thread has begun, and beside it
                for call in (engine.step, lambda: engine.generate([Request([5], 1)]), engine.close):
                    with pytest.raises(ConfigError, match=r"^an AsyncEngine steps this engine; "):
                        await asyncio.to_thread(call)
                with pytest.raises(ConfigError, match=r"^an AsyncEngine steps this engine; .* its close\(\)"):
                    AsyncEngine(engine)
                task = asyncio.create_task(collect(serving, Request([3], 400)))
                await until(lambda: engine.num_running == 1)
            engine.cancel(engine.submit(Request([5], 50)))
            assert engine.stats().num_running >= 1
            assert len(await task) == 400

    with Engine(model, cache) as engine:
        run(main())
        assert len(engine.generate([Request([5], 3)])[0].tokens) == 3
        run(main_of_another(engine))
    with pytest.raises(ConfigError, match="is closed"):
        AsyncEngine(engine)


async def main_of_another(engine: Engine) -> None:
    await AsyncEngine(engine).close()  # without a stream
    async with AsyncEngine(engine) as serving:
        assert len(await collect(serving, Request([5], 3))) == 3


@pytest.mark.parametrize("raised", [SystemExit, asyncio.CancelledError, GeneratorExit])
def test_what_is_no_exception_fails_the_streams_that_run(
    model: Llama, cache: KVCache, raised: type[BaseException]
) -> None:
    """It ended the thread: these streams and all later ones waited for ever."""

    def allowed(answer: Any) -> Any:
        raise raised

    async def main() -> None:
        async with AsyncEngine(engine) as serving:
            other = asyncio.create_task(collect(serving, Request([7], 500)))
            await until(lambda: engine.num_running == 1)
            for task in (collect(serving, Request([3], 5, allowed_tokens=allowed)), other):
                with pytest.raises(RuntimeError, match=raised.__name__) as caught:
                    await task
                assert isinstance(caught.value.__cause__, raised)
            assert len(await collect(serving, Request([5], 4))) == 4
            engine.submit(Request([3], 5, allowed_tokens=allowed))  # whose tokens nobody would get
            await until(lambda: not engine.has_work)
            assert len(await collect(serving, Request([5], 4))) == 4

    with Engine(model, cache) as engine:
        run(main())


def test_one_that_nobody_refers_to_lets_go(model: Llama, cache: KVCache) -> None:
    async def main() -> None:
        serving = AsyncEngine(engine)
        assert len(await collect(serving, Request([5], 3))) == 3

    with Engine(model, cache) as engine:
        run(main())
        gc.collect()
        threads = [thread for thread in threading.enumerate() if thread.name == "vattn-engine"]
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
        assert len(engine.generate([Request([5], 3)])[0].tokens) == 3


_UNCLOSED = """
import asyncio, sys
from helpers.llama import small_model
from vattn import AsyncEngine, Engine, Request

async def main():
    global kept
    engine = Engine(small_model(), memory_limit=64 << 20)
    serving = AsyncEngine(engine)
    stream = serving.stream(Request([1, 2], 500))
    await anext(stream)
    kept = engine, serving, stream
    engine.submit(Request([1, 2], 500, n=64))  # it has work to do while the interpreter ends
    assert engine.has_work

asyncio.run(main())
sys.exit(7)
"""


def test_a_process_that_closes_none_ends_as_it_wants_to() -> None:
    """It was aborted: "terminate called without an active exception"."""
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", _UNCLOSED], cwd=Path(__file__).parents[1], env=_environment(), capture_output=True,
            timeout=120, text=True, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (7, "")


def _environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[1]), str(Path(vattn.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
