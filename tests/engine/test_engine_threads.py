"""Threads, signals, forks, and the end of an engine."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers.engine import Faulty, alone, by_sample, ends, requests_of, run_out

from vattn import Engine, KVCache, Request
from vattn.errors import ConfigError, QueueFull
from vattn.models import Llama


# -- threads ---------------------------------------------------------------------------------------------------------
def test_submit_and_cancel_from_many_threads(model: Llama, cache: KVCache) -> None:
    """Every client gets an id of his own, and the tokens of his own request."""
    kinds = [Request([i, i + 1, i + 2], 6) for i in range(40)]
    expected = [c.tokens for (c,) in alone(model, kinds)]
    ids: dict[int, int] = {}
    cancelled: set[int] = set()
    with Engine(model, cache) as engine:

        def client(first: int) -> None:
            for i in range(first, 40, 4):
                ids[i] = engine.submit(kinds[i])
                if i % 5 == 0:
                    engine.cancel(ids[i])
                    cancelled.add(i)

        threads = [threading.Thread(target=client, args=(i,)) for i in range(4)]
        tokens = []
        for thread in threads:
            thread.start()
        while engine.has_work or any(thread.is_alive() for thread in threads):
            tokens += engine.step()
        for thread in threads:
            thread.join()
        tokens += run_out(engine)
    assert sorted(ids.values()) == list(range(40))
    found = by_sample(tokens)
    assert {(ids[i], 0): expected[i] for i in range(40) if i not in cancelled} == {
        key: value for key, value in found.items() if key[0] not in {ids[i] for i in cancelled}
    }


def test_step_from_two_threads_is_refused(model: Llama, cache: KVCache) -> None:
    faulty = Faulty(model)
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(30)
        faulty.on_decode = None

    faulty.on_decode = wait
    with Engine(faulty, cache) as engine:
        request_id = engine.submit(Request([3], 5))
        tokens: list[Any] = []
        thread = threading.Thread(target=lambda: tokens.extend(run_out(engine)))
        thread.start()
        assert inside.wait(30)
        for call in (engine.step, lambda: engine.generate([Request([5], 1)]), engine.close):
            with pytest.raises(ConfigError, match="another thread is in step"):
                call()
        later = engine.submit(Request([5], 2))  # these may come at any time
        engine.cancel(later)
        go_on.set()
        thread.join()
        assert by_sample(tokens) == {(request_id, 0): alone(model, [Request([3], 5)])[0][0].tokens}


def test_what_is_cancelled_while_a_step_runs_is_not_reported(model: Llama, cache: KVCache) -> None:
    faulty = Faulty(model)
    with Engine(faulty, cache) as engine:
        first, second = (engine.submit(Request([3 + i], 9)) for i in range(2))
        engine.step()

        def cancel() -> None:
            faulty.on_decode = None
            thread = threading.Thread(target=engine.cancel, args=(first,))
            thread.start()
            thread.join()

        faulty.on_decode = cancel
        tokens = run_out(engine)
        assert {new.request_id for new in tokens} == {second}


def test_a_callback_may_submit_and_cancel_but_not_step(model: Llama, cache: KVCache) -> None:
    raised = []

    def allowed(answer: Any) -> Any:
        if not answer:
            engine.cancel(doomed)
            ids.append(engine.submit(Request([5], 2)))
            with pytest.raises(ConfigError, match="from within a step") as caught:
                engine.step()
            raised.append(caught.value)
        return np.ones(128, bool)

    ids: list[int] = []
    with Engine(model, cache) as engine:
        doomed = engine.submit(Request([9], 50))
        asking = engine.submit(Request([3], 3, allowed_tokens=allowed))
        tokens = run_out(engine)
        assert {key[0]: reason for key, reason in ends(tokens).items()} == {asking: "length", ids[0]: "length"}
    assert len(raised) == 1


# -- the queue, the end, interrupts ----------------------------------------------------------------------------------
def test_a_full_queue(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache, max_batch=1, max_waiting=2) as engine:
        ids = [engine.submit(Request([3 + i], 4)) for i in range(2)]
        with pytest.raises(QueueFull, match=r"2 samples wait, and max_waiting is 2") as caught:
            engine.submit(Request([9], 4))
        assert caught.value.max_waiting == 2
        assert len(engine.generate([Request([i], 1) for i in range(5)])) == 5  # which does not count
        while len(ids) < 6:
            engine.step()
            try:
                ids.append(engine.submit(Request([9], 4)))
            except QueueFull:
                assert engine.num_waiting == 2
        run_out(engine)


def test_a_closed_engine(model: Llama, cache: KVCache) -> None:
    engine = Engine(model, cache)
    engine.submit(Request([3], 40))
    engine.submit(Request([5] * 40, 40))
    engine.step()
    engine.close()
    engine.close()
    for call in (engine.step, lambda: engine.submit(Request([3])), lambda: engine.generate([])):
        with pytest.raises(ConfigError, match="engine is closed"):
            call()
    engine.cancel(0)
    assert (engine.has_work, engine.stats().num_running) == (False, 0)


def test_an_id_that_was_not_given_out_yet_cannot_be_cancelled(model: Llama, cache: KVCache) -> None:
    faulty = Faulty(model)
    with Engine(faulty, cache) as engine:
        engine.submit(Request([3], 3))
        later = []

        def cancel_ahead() -> None:
            faulty.on_decode = None
            engine.cancel(1)
            later.append(engine.submit(Request([5], 2)))

        faulty.on_decode = cancel_ahead
        assert len(by_sample(run_out(engine))[1, 0]) == 2
        assert later == [1]


def test_an_engine_that_nobody_closed_gives_its_slots_back(model: Llama, cache: KVCache) -> None:
    engine = Engine(model, cache)
    engine.submit(Request([3], 40))
    engine.step()
    del engine
    assert cache.stats().num_live_slots == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_leaves_the_engine_alone(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache) as engine:
        engine.submit(Request([3], 5))
        tokens = engine.step()
        child = os.fork()
        if child == 0:
            try:
                for call in (engine.step, lambda: engine.submit(Request([3]))):
                    with pytest.raises(ConfigError, match="forked"):
                        call()
                os._exit(0)
            finally:
                os._exit(1)
        assert os.waitpid(child, 0) == (child, 0)
        assert len(tokens + run_out(engine)) == 5


def test_ctrl_c_at_every_step_loses_nothing(model: Llama, cache: KVCache) -> None:
    """It is raised when the step is through, and its tokens come with the next."""
    wanted = requests_of(6, max_new_tokens=12)
    faulty = Faulty(model)
    faulty.on_decode = lambda: signal.raise_signal(signal.SIGINT)
    faulty.on_prefill = lambda packed: signal.raise_signal(signal.SIGINT)
    with Engine(faulty, cache, max_step_tokens=5) as engine:
        ids = [engine.submit(request) for request in wanted]
        tokens, num_interrupted = [], 0
        while engine.has_work:
            try:
                tokens += engine.step()
            except KeyboardInterrupt:
                num_interrupted += 1
                if num_interrupted == 12:
                    faulty.on_decode = faulty.on_prefill = None
        assert num_interrupted == 12
        found = by_sample(tokens)
        assert [found[i, 0] for i in ids] == [c.tokens for (c,) in alone(model, wanted)]


def test_ctrl_c_in_generate_drops_its_own_only(model: Llama, cache: KVCache) -> None:
    faulty = Faulty(model)
    with Engine(faulty, cache) as engine:
        other = engine.submit(Request([3, 5], 10))
        tokens = engine.step()

        def interrupt() -> None:
            faulty.on_decode = None
            signal.raise_signal(signal.SIGINT)

        faulty.on_decode = interrupt
        with pytest.raises(KeyboardInterrupt):
            engine.generate([Request([7], 30)])
        assert engine.num_running == 1
        tokens += run_out(engine)
        assert by_sample(tokens) == {(other, 0): alone(model, [Request([3, 5], 10)])[0][0].tokens}


def test_the_memory_of_what_is_cancelled_in_a_step_comes_back_with_its_end(model: Llama, cache: KVCache) -> None:
    faulty = Faulty(model)
    with Engine(faulty, cache) as engine:
        doomed = engine.submit(Request([3], 9))
        engine.step()

        def cancel() -> None:
            faulty.on_decode = None
            thread = threading.Thread(target=engine.cancel, args=(doomed,))
            thread.start()
            thread.join()

        faulty.on_decode = cancel
        while faulty.on_decode is not None:
            tokens = engine.step()
        assert tokens == []
        assert (engine.has_work, engine.num_running, cache.stats().num_live_slots) == (False, 0, 1)


def test_a_step_waits_for_a_cancellation_of_another_thread(
    model: Llama, cache: KVCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was refused, as if that thread was in ``step``."""
    inside = threading.Event()
    with Engine(model, cache) as engine:
        doomed, other = (engine.submit(Request([3 + i], 9)) for i in range(2))
        engine.step()
        cancel = engine._samples.cancel

        def slow(request_id: int) -> None:
            inside.set()
            time.sleep(0.1)
            cancel(request_id)

        monkeypatch.setattr(engine._samples, "cancel", slow)
        thread = threading.Thread(target=engine.cancel, args=(doomed,))
        thread.start()
        assert inside.wait(30)
        tokens = run_out(engine)
        thread.join()
        assert {new.request_id for new in tokens} == {other}


def test_every_sample_of_a_request_counts_in_the_queue(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache, max_batch=1, max_waiting=3) as engine:
        with pytest.raises(ConfigError, match=r"^n is 10, and max_waiting of this engine is 3: .* lower n"):
            engine.submit(Request([3], 2, n=10))
        engine.submit(Request([3], 2, n=2))
        with pytest.raises(
            QueueFull, match=r"^2 samples wait, and max_waiting is 3: a request with n = 2 does not fit"
        ):
            engine.submit(Request([5], 2, n=2))
        engine.submit(Request([5], 2))
        assert engine.num_waiting == 3
        assert len(engine.generate([Request([7], 1, n=10)])) == 10  # which does not count
        run_out(engine)


def test_what_is_no_id_cannot_be_cancelled(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache) as engine:
        request_id = engine.submit(Request([3], 9))
        for bad in ("x", None, 0.0, True, Request([3])):
            with pytest.raises(ConfigError, match="cancel takes an id that submit returned, an int, got"):
                engine.cancel(bad)  # type: ignore[arg-type]
        engine.cancel(-1)
        assert engine.num_waiting == 1
        engine.cancel(np.int64(request_id))  # type: ignore[arg-type]
        assert not engine.has_work


def test_stats_print_on_a_line(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache) as engine:
        engine.generate([Request([3], 9, n=2)])
        stats = engine.stats()
        assert len(repr(stats)) < 600
        histogram = stats.between_tokens_s
        for part in ("count=16", f"mean={histogram.mean:.3g}", f"p50={histogram.quantile(0.5):.3g}", "p99="):
            assert part in repr(histogram)


def test_what_load_returns_is_named_where_it_is_not_taken_apart(model: Llama) -> None:
    with pytest.raises(
        ConfigError, match=r"as transformers loads it or as vattn\.models\.load\(\.\.\.\)\[0\] gives it, not a tuple"
    ):
        Engine((model, None))


def test_generate_hands_out_nothing_of_what_a_callback_cancels(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache) as engine:
        other = engine.submit(Request([3], 30))

        def allowed(answer: Sequence[int]) -> None:
            if len(answer) == 5:
                engine.cancel(other)

        engine.generate([Request([5], 9, allowed_tokens=allowed)])
        assert not engine.has_work
        assert engine.step() == []


def test_a_signal_at_the_end_of_submit_leaves_no_request_that_nobody_knows(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache) as engine:
        post = engine._mail.post

        def interrupted(request: Request) -> int:
            request_id = post(request)
            signal.raise_signal(signal.SIGINT)
            return request_id

        engine._mail.post = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            engine.submit(Request([3], 9))
        engine._mail.post = post  # type: ignore[method-assign]
        assert run_out(engine) == []


def test_an_end_that_nobody_collected_is_work(model: Llama, cache: KVCache) -> None:
    """One ends by its deadline in a step that raises."""

    def leave(answer: Sequence[int]) -> None:
        raise SystemExit

    with Engine(model, cache) as engine:
        other = engine.submit(Request([5], 9, allowed_tokens=leave))
        doomed = engine.submit(Request([3], 9, deadline_s=0.0))
        with pytest.raises(SystemExit):
            run_out(engine)
        engine.cancel(other)
        assert engine.has_work
        assert [(new.request_id, new.finish_reason) for new in engine.step()] == [(doomed, "deadline")]
        assert not engine.has_work


def test_close_wakes_who_waits(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache) as engine:
        thread = threading.Thread(target=engine.wait)
        thread.start()
        time.sleep(0.1)
    thread.join(30)
    assert not thread.is_alive()


def test_an_engine_is_not_copied(model: Llama, cache: KVCache) -> None:
    with Engine(model, cache) as engine, pytest.raises(TypeError, match="cannot be copied"):
        copy.copy(engine)
