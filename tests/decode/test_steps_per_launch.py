"""Several steps of a decode loop in one launch."""

from __future__ import annotations

import pytest
import torch
from helpers.decode import by_slot, eager, prefill, walk
from helpers.llama import open_cache, small_model

from vattn import KVCache
from vattn.decode import DecodeLoop, graphs
from vattn.errors import ConfigError, OutOfPages
from vattn.graphs.capture import CaptureFailed
from vattn.models import FusedLlama, Llama

PROMPTS = [[3, 5, 7], [2, 9]]


@pytest.fixture
def model(device) -> Llama:
    return small_model().to(device)


@pytest.fixture
def fused(model, monkeypatch) -> FusedLlama:
    """Where there are no graphs, the steps of a launch run one after the other, without the host between them."""

    def launch_several(self, bucket):
        key = self.key_of_several(bucket)
        for _ in range(self.steps_per_launch):
            self._run(bucket, key=key)
        return key

    if model.device.type != "cuda":
        monkeypatch.setattr(graphs.StepGraphs, "several", lambda self, bucket: self.steps_per_launch)
        monkeypatch.setattr(graphs.StepGraphs, "launch_several", launch_several)
    return FusedLlama(model)


def counted(loop: DecodeLoop, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps of each launch from now on."""
    counts, launch = [], loop._step.launch

    def count_and_launch(slots, compute=None, count=1):
        counts.append(count)
        return launch(slots, compute, count)

    monkeypatch.setattr(loop._step, "launch", count_and_launch)
    return counts


@pytest.mark.parametrize(("ahead", "per_launch"), [(2, 2), (3, 2), (8, 8), (16, 8)])
def test_sequences_come_and_go(fused, model, ahead, per_launch):
    # Sequences end after fewer calls, so that fewer pages are in use.
    walk(fused, model, num_events=400, seed=5, num_pages=16, steps_ahead=ahead, steps_per_launch=per_launch)


def test_sequences_end_among_the_steps_of_a_launch(fused, model, monkeypatch):
    expected = eager(model, PROMPTS, 40)
    options = {"buckets": [1, 4], "steps_ahead": 8, "steps_per_launch": 4}
    with open_cache(model, 5) as cache, DecodeLoop(fused, cache, max_batch=4, **options) as loop:
        counts = counted(loop, monkeypatch)
        slots = [prefill(model, cache, prompt) for prompt in PROMPTS]
        for slot, prompt, num in zip(slots, PROMPTS, (39, 22), strict=True):
            loop.start(slot, prompt[-1], num)
        assert loop.step() == loop.step() == [], "eight steps are under way"
        with torch.inference_mode(), torch.cuda.stream(loop.stream):
            assert loop.logits().argmax(-1).tolist() == [each[7] for each in expected]
        found = by_slot(loop.run())
        assert [tuple(found[slot]) for slot in slots] == [expected[0][:39], expected[1][:22]]
        assert counts == [4] * 10
        assert [cache.seq_len(slot) for slot in slots] == [2 + 39, 1 + 22]

        stop = expected[0][9]
        length = expected[0].index(stop) + 1
        cache.truncate(slots[0], 2)
        loop.start(slots[0], 7, 40, stop_tokens=[stop])
        assert tuple(by_slot(loop.run())[slots[0]]) == expected[0][:length]
        assert cache.seq_len(slots[0]) == 2 + length
        assert set(counts) == {4}
        cache.check_integrity()


def test_one_by_one_at_the_end_of_the_context(fused, model, monkeypatch):
    """There is no row behind the last."""
    (expected,) = eager(model, [PROMPTS[0]], 14)
    options = {"steps_ahead": 4, "steps_per_launch": 4}
    with KVCache(model.kv_layout(16), 2, model.device) as cache, DecodeLoop(fused, cache, **options) as loop:
        counts = counted(loop, monkeypatch)
        slot = prefill(model, cache, PROMPTS[0])
        loop.start(slot, 7, 14)
        assert tuple(by_slot(loop.run())[slot]) == expected
        assert counts == [4, 4, 4, 1, 1]
        assert cache.seq_len(slot) == 16


def test_one_by_one_where_the_caller_may_say_something(fused, model, monkeypatch):
    """A mask for each token, other tokens than the sampled ones, log-probabilities; some of the slots."""
    expected = eager(model, PROMPTS, 12)
    with (
        open_cache(model, 4, max_seq_len=60) as cache,
        DecodeLoop(fused, cache, steps_ahead=4, steps_per_launch=4) as loop,
    ):
        counts = counted(loop, monkeypatch)
        slots = [prefill(model, cache, prompt) for prompt in PROMPTS]
        loop.start(slots[0], 7, 6)
        tokens = []
        for wanted in (11, 12, 13):
            mask = torch.zeros(model.config.vocab_size, dtype=torch.bool)
            mask[wanted] = True
            loop.allow(slots[0], mask)
            tokens += loop.step()
            tokens += loop.drain()
        assert [each.token for each in tokens] == [11, 12, 13]
        assert counts == [1, 1, 1]
        loop.allow(slots[0], None)
        loop.step()
        assert counts == [1, 1, 1, 4]
        loop.cancel(slots[0])

        counts.clear()
        loop.start(slots[1], 9, 12, num_logprobs=2)
        assert tuple(by_slot(loop.run())[slots[1]]) == expected[1]
        assert counts == [1] * 12

        counts.clear()
        cache.truncate(slots[1], 1)
        loop.start(slots[1], 9, 12)
        loop.feed([slots[1]], torch.tensor([9], device=model.device))
        loop.step()
        loop.step([slots[1]])
        assert tuple(by_slot(loop.run())[slots[1]]) == expected[1]
        assert counts == [1, 1, 4, 4, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts pages of 16 rows")
def test_pages_for_one_step_but_not_for_all(fused, model, monkeypatch):
    prompts = [list(range(1, 11)), list(range(2, 12))]
    expected = eager(model, prompts, 20)
    cache = KVCache(model.kv_layout(160), 3, "cpu", memory_limit=2 * 4096, page_bytes=4096)
    options = {"ahead_tokens": 0, "mapping": "inline", "steps_ahead": 8, "steps_per_launch": 8}
    with cache, DecodeLoop(fused, cache, **options) as loop:
        counts = counted(loop, monkeypatch)
        first, second = [prefill(model, cache, prompt) for prompt in prompts]
        for slot, prompt in zip((first, second), prompts, strict=True):
            loop.start(slot, prompt[-1], 20)
        tokens = []
        for _ in range(7):  # 16 rows of each fit, and each has 9
            tokens += loop.step()
        assert counts == [1] * 7
        with pytest.raises(OutOfPages):
            loop.step()
        tokens += loop.drain()
        loop.cancel(second)
        cache.release(second)
        found = by_slot(tokens + loop.run())
        assert tuple(found[first]) == expected[0]
        assert tuple(found[second]) == expected[1][:7]
        assert max(counts) == 8
        cache.check_integrity()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["measure", "first use"])
def test_other_modes(mode, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # of measured choices
    model = small_model().to("cuda")
    (expected,) = eager(model, PROMPTS[:1], 30)
    options = {"graphs": mode, "buckets": [2], "steps_ahead": 4, "steps_per_launch": 4}
    with open_cache(model, 3) as cache, DecodeLoop(FusedLlama(model), cache, max_batch=2, **options) as loop:
        counts = counted(loop, monkeypatch)
        slot = prefill(model, cache, PROMPTS[0])
        loop.start(slot, 7, 30)
        assert tuple(by_slot(loop.run())[slot]) == expected
        if mode == "first use":  # one step captures
            assert counts == [1] + [4] * 8
        else:
            assert max(counts) == (4 if loop.graphs[0].captured else 1)
        assert loop.graphs[0].failed == {}


@pytest.mark.gpu
@pytest.mark.parametrize("error", [CaptureFailed("no"), torch.OutOfMemoryError("no")])
def test_a_graph_of_several_steps_that_cannot_be(error, monkeypatch):
    captured = graphs.captured

    def fails(run, pool=None):
        if getattr(run, "__name__", "") == "several":
            raise error
        return captured(run, pool)

    model = small_model().to("cuda")
    (expected,) = eager(model, PROMPTS[:1], 30)
    monkeypatch.setattr(graphs, "captured", fails)
    options = {"buckets": [1, 2], "steps_ahead": 4, "steps_per_launch": 4}
    with open_cache(model, 3) as cache, DecodeLoop(FusedLlama(model), cache, max_batch=2, **options) as loop:
        counts = counted(loop, monkeypatch)
        slot = prefill(model, cache, PROMPTS[0])
        loop.start(slot, 7, 30)
        assert tuple(by_slot(loop.run())[slot]) == expected
        assert counts == [1] * 30
        for report in loop.graphs:
            assert report.captured
            assert report.failed == {"4 steps in one launch": f"{type(error).__name__}: no"}


@pytest.mark.parametrize("wrong", [0, 9, -1, 1.5, True, "2"])
def test_so_many_there_are_not(fused, model, wrong):
    with open_cache(model, 3) as cache:
        with pytest.raises(ConfigError, match="steps_per_launch"):
            DecodeLoop(fused, cache, steps_ahead=16, steps_per_launch=wrong)
        with pytest.raises(ConfigError, match="raise steps_ahead to at least 3"):
            DecodeLoop(fused, cache, steps_ahead=2, steps_per_launch=3)
        assert cache.stats().num_live_slots == 0
