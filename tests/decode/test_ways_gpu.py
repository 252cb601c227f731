"""The measured choice of a step's way, as a loop makes it on a GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers.decode import by_slot, eager, prefill, prompts_for
from helpers.llama import open_cache, small_model
from test_ways import DEPENDENT, Offering

import vattn
from vattn.decode import DecodeLoop
from vattn.models import FusedLlama, Llama
from vattn.ops.ops_table import LinearTable, fused_ops
from vattn.tuning.choices import EAGER, Choice, choices_for

pytestmark = pytest.mark.gpu


def decode(fused: FusedLlama, model: Llama, mode: str, **options: object) -> tuple[list[tuple[int, ...]], tuple]:
    """Greedy tokens of five prompts, and the reports of the loop's graphs."""
    prompts = prompts_for(model, 5)
    with open_cache(model, 7) as cache, DecodeLoop(fused, cache, graphs=mode, **options) as loop:  # type: ignore[arg-type]
        slots = [prefill(model, cache, prompt) for prompt in prompts]
        for slot, prompt in zip(slots, prompts, strict=True):
            loop.start(slot, prompt[-1], 30)
        found = by_slot(loop.run())
        assert loop.logits().shape[0] == 5
        reports = loop.graphs
        loop.close()
        for slot in slots:
            cache.release(slot)
        assert cache.stats().num_live_slots == 0, "the loop's own slot was not given back"
        cache.check_integrity()
    return [tuple(found[slot]) for slot in slots], reports


@pytest.fixture
def on_gpu(tmp_path, monkeypatch) -> Llama:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return small_model().to("cuda")


def fused_with_pdl(model: Llama, kind: Callable[..., FusedLlama] = FusedLlama) -> FusedLlama:
    pdl = torch.cuda.get_device_capability() >= (9, 0)
    return kind(model, ops=fused_ops(LinearTable({}, pdl=pdl)))


def test_measured_once_and_the_same_tokens(on_gpu, monkeypatch):
    fused = fused_with_pdl(on_gpu)
    expected = eager(on_gpu, prompts_for(on_gpu, 5), 30)
    tokens, first = decode(fused, on_gpu, "measure")
    assert tokens == expected
    ways = [EAGER, "graph", *([DEPENDENT] if fused.ops.plain else [])]
    for report in first:
        assert list(report.us) == ways
        assert not report.failed
        assert report.captured == (report.way != EAGER)
        assert report.us[report.way] <= 1.01 * min(report.us.values())
        assert report.eager_us == report.us[EAGER]
        assert report.graph_us == min(us for way, us in report.us.items() if way != EAGER)
        assert report.rows == on_gpu.config.max_position_embeddings // 2
    records, reason = choices_for(torch.device("cuda")).read()
    assert reason is None
    assert len(records) == len(first)
    for _, choice in records:
        assert re.fullmatch(r"\d+\.\d", choice.versions["driver"])
        assert choice.versions["cuda"] == torch.version.cuda

    monkeypatch.setattr("vattn.decode.ways.time_in_turns", lambda *args: pytest.fail("a step was timed again"))
    captures = []
    real = vattn.decode.graphs.captured
    monkeypatch.setattr("vattn.decode.graphs.captured", lambda *args: captures.append(1) or real(*args))
    monkeypatch.setattr("vattn.decode.step.captured", lambda *args: pytest.fail("a way was captured to be timed"))
    tokens, second = decode(fused, on_gpu, "measure")
    assert tokens == expected
    assert [(each.way, each.us) for each in second] == [(each.way, each.us) for each in first]
    assert len(captures) == sum(each.captured for each in second)


@pytest.mark.parametrize("way", [EAGER, "graph", DEPENDENT, "graph + persistent"])
def test_each_way_gives_the_same_tokens(on_gpu, way, monkeypatch):
    fused = fused_with_pdl(on_gpu, Offering)
    if way == DEPENDENT and fused.ops.plain is None:
        pytest.skip("needs compute capability 9.0")
    monkeypatch.setattr(
        "vattn.decode.ways.time_in_turns", lambda timed, wait: {each: 1.0 + (each != way) for each in timed}
    )
    tokens, reports = decode(fused, on_gpu, "measure")
    assert {report.way for report in reports} == {way}
    assert tokens == eager(on_gpu, prompts_for(on_gpu, 5), 30)


@pytest.mark.unsanitized
def test_a_slower_way_is_not_chosen(on_gpu):
    tokens, reports = decode(fused_with_pdl(on_gpu, partial(Offering, seconds=0.005)), on_gpu, "measure", buckets=[6])
    assert tokens == eager(on_gpu, prompts_for(on_gpu, 5), 30)
    (report,) = reports
    assert report.us["graph + persistent"] > 2 * report.us["graph"]
    assert report.way != "graph + persistent"


def test_a_way_that_cannot_be_captured_is_left_out(on_gpu):
    class Waiting(FusedLlama):
        def ways(self, batch, cache):
            own = super().ways(batch, cache)

            def waits(residual, batch, attention):
                residual.sum().item()
                return own["kernels"](residual, batch, attention)

            return own | {"waiting": waits}

    tokens, reports = decode(fused_with_pdl(on_gpu, Waiting), on_gpu, "measure", buckets=[2, 6])
    assert tokens == eager(on_gpu, prompts_for(on_gpu, 5), 30)
    for report in reports:
        assert list(report.failed) == ["graph + waiting"]
        assert "graph + waiting" not in report.us


def test_a_kept_way_that_fails_now_is_named_and_measured_again(on_gpu):
    fused = fused_with_pdl(on_gpu, Offering)
    decode(fused, on_gpu, "measure", buckets=[6])
    store = choices_for(torch.device("cuda"))
    ((key, choice),) = store.read()[0]
    store.keep(key, Choice.of({way: 1.0 if way == "graph + persistent" else 9.0 for way in choice.us}))
    fused.raises = RuntimeError("not today")  # type: ignore[attr-defined]
    tokens, (report,) = decode(fused, on_gpu, "measure", buckets=[6])
    assert tokens == eager(on_gpu, prompts_for(on_gpu, 5), 30)
    assert (report.way, report.captured) == (EAGER, False)
    assert report.failed == {"graph + persistent": "RuntimeError: not today"}
    assert store.find(key) is None
