"""The measured choice of a step's way: on the CPU, with launches in the place of graphs."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.llama import hf_model_of, open_cache, run, same_in_vattn, small_model

import vattn
from vattn.attention import DecodeBatch, TritonDecodeAttention, bind, get
from vattn.decode import OffersWays
from vattn.decode.graphs import StepGraphs
from vattn.decode.ways import Chosen, choose_ways, measured, step_key, ways_of
from vattn.errors import DriverError
from vattn.models import FusedLlama, Llama
from vattn.ops.ops_table import LinearTable, Ops, fused_ops, reference_ops
from vattn.tuning.choices import EAGER, Choice, Choices

DEPENDENT = "graph + dependent launch"


@pytest.fixture
def model() -> Llama:
    return small_model()


@pytest.fixture
def store(tmp_path) -> Choices:
    return Choices(tmp_path / "A_GPU.graphs.json", "A GPU")


class Offering(FusedLlama):
    """A model that offers one way more: ``decode`` over again, after ``seconds`` of waiting, or with an error."""

    def __init__(self, *args: object, seconds: float = 0.0, raises: Exception | None = None, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.seconds, self.raises = seconds, raises

    def ways(self, batch, cache):
        own = super().ways(batch, cache)

        def another(residual, batch, attention):
            if self.raises is not None:
                raise self.raises
            time.sleep(self.seconds)
            if self.seconds and residual.is_cuda:  # a graph holds this, but not the host's sleep
                torch.cuda._sleep(int(self.seconds * 1e9))
            return own["kernels"](residual, batch, attention)

        return own | {"persistent": another}


class Bench:
    """What a step gives ``choose_ways``, with launches that are timed themselves where a GPU would replay graphs."""

    def __init__(self, fused: FusedLlama, cache: vattn.KVCache, store: Choices, typical_len: int = 40) -> None:
        self.fused, self.cache, self.store, self.typical_len = fused, cache, store, typical_len
        self.scratch = cache.acquire()
        cache.ensure(self.scratch, 1)
        self.lengths = torch.zeros(cache.max_slots, dtype=torch.int32)
        self.attention = bind(get("reference"))
        self.ran: list[tuple[int, int]] = []  # batch and row of each step

    def run(self, batch: int, compute: Callable[..., torch.Tensor] | None) -> None:
        slots = torch.full((batch,), self.scratch, dtype=torch.int32)
        rows = self.lengths[slots]
        at = DecodeBatch(slots, rows, rows + 1, self.cache.layout.max_seq_len)
        residual = self.fused.embedding[:1].repeat(batch, 1)
        if compute is None:
            logits = self.fused.decode(residual, at, self.cache, self.attention)
        else:
            logits = compute(residual, at, self.attention)
        assert logits.isfinite().all()
        self.ran.append((batch, int(rows[0])))

    def choose(self, *batches: int):
        self.ran.clear()
        with torch.inference_mode():
            return choose_ways(
                self.fused,
                self.cache,
                self.scratch,
                self.lengths,
                batches=batches,
                typical_len=self.typical_len,
                attention=lambda batch: self.attention.name,
                run=self.run,
                measure=lambda ways: measured(ways, capture=lambda launch: launch, wait=lambda: None),
                store=self.store,
            )


def test_every_way_is_measured_once(model, store):
    with open_cache(model, 3) as cache:
        bench = Bench(Offering(model, seconds=0.03), cache, store)
        found = bench.choose(1, 2)
        assert set(found) == {1, 2}
        for each in found.values():
            assert set(each.choice.us) == {EAGER, "graph", "graph + persistent"}
            assert each.choice.us["graph + persistent"] > 30_000
            assert each.choice.way != "graph + persistent"
            assert each.rows == 40
        assert {row for _, row in bench.ran} == {39}
        assert bench.ran[0][0] == 2, "the largest comes first"
        assert cache.seq_len(bench.scratch) == 1
        assert not bench.lengths.any()
        cache.check_integrity()

        again = Bench(Offering(model, seconds=0.03), cache, store).choose(1, 2)
        assert {batch: each.choice for batch, each in again.items()} == {b: e.choice for b, e in found.items()}


def test_a_second_time_nothing_is_timed_and_what_is_missing_is(model, store):
    with open_cache(model, 4) as cache:
        bench = Bench(FusedLlama(model), cache, store)
        first = bench.choose(1, 2)
        assert bench.ran
        assert bench.choose(1, 2).keys() == first.keys()
        assert bench.ran == []
        third = bench.choose(1, 2, 3)
        assert {batch for batch, _ in bench.ran} == {3}
        assert third[1].choice == first[1].choice
        third[1].launch()
        assert bench.ran[-1] == (1, 0)
        third[2].drop()
        bench.choose(1, 2, 3)
        assert {batch for batch, _ in bench.ran} == {2}


def test_a_way_that_is_new_is_measured_beside_the_others(model, store):
    with open_cache(model, 3) as cache:
        slow = Bench(FusedLlama(model), cache, store)
        slow.choose(1)
        bench = Bench(Offering(model), cache, store)
        assert slow.choose(1)[1].choice.us.keys() == {EAGER, "graph"}
        key = step_key(bench.fused, cache, "reference", 1, 40)
        store.keep(key, Choice.of({EAGER: 5.0, "graph": 1.0}))
        assert "graph + persistent" in bench.choose(1)[1].choice.us
        store.keep(key, Choice.of({EAGER: 5.0, "graph": 5.0, "graph + persistent": 5.0, "graph + gone": 1.0}))
        assert bench.choose(1)[1].choice.way != "graph + gone"


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (RuntimeError("not on this GPU"), True),
        (torch.OutOfMemoryError("full"), False),
        (DriverError("cuModuleLoadData", "CUDA_ERROR_INVALID_IMAGE"), False),
        (ModuleNotFoundError("no cuda"), False),
    ],
    ids=repr,
)
def test_a_way_that_raises_is_left_out_and_named(model, store, error, kept):
    with open_cache(model, 3) as cache:
        bench = Bench(Offering(model, raises=error), cache, store)
        choice = bench.choose(2)[2].choice
        assert set(choice.us) == {EAGER, "graph"}
        assert choice.failed == {"graph + persistent": f"{type(error).__name__}: {error}"}
        bench.choose(2)
        assert (bench.ran == []) == kept, "a way for which memory was short is tried again"


def test_what_a_graph_uses_lives_as_long_as_it(monkeypatch):
    """A way's compute has memory of its own, which the graph goes on using."""

    class Launch:
        def __call__(self):
            ran.append(1)

    class Graph:
        def __init__(self, launch):
            self.memory = weakref.ref(launch)

        def replay(self):
            self.memory()()

    for name, result in (("synchronize", None), ("empty_cache", None), ("memory_reserved", 0)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, result=result: result)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 0))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr("vattn.decode.graphs.captured", lambda launch, pool: Graph(launch))
    ran, launch = [], Launch()
    alive = weakref.ref(launch)
    graphs = StepGraphs(lambda batch: pytest.fail("launched"), [2], torch.device("cuda"), "measure")
    choice = Choice.of({EAGER: 2.0, "graph + persistent": 1.0})
    graphs.capture({2: Chosen(choice, launch, 40, lambda: None)})
    del launch
    gc.collect()
    ran.clear()
    graphs.launch(2)
    assert ran == [1]
    assert graphs.reports[0].way == "graph + persistent"
    graphs.release()
    gc.collect()
    assert alive() is None


def test_what_the_eager_step_raises_is_raised(model, store):
    class Refusing(FusedLlama):
        def decode(self, *args):
            raise RuntimeError("no kernel")

    with open_cache(model, 3) as cache:
        bench = Bench(Refusing(model), cache, store)
        with pytest.raises(RuntimeError, match="no kernel"):
            bench.choose(1)
        assert cache.seq_len(bench.scratch) == 1
        assert not bench.lengths.any()
        assert store.read() == ([], None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts pages of 16 rows")
def test_a_cache_without_pages_for_a_typical_sequence(model, store):
    with vattn.KVCache(model.kv_layout(160), 3, "cpu", memory_limit=2 * 4096, page_bytes=4096) as cache:
        bench = Bench(FusedLlama(model), cache, store, typical_len=150)
        with pytest.warns(RuntimeWarning, match="no pages for one of 150"):
            found = bench.choose(1)
        assert found[1].rows == 1
        assert {row for _, row in bench.ran} == {0}
        with pytest.warns(RuntimeWarning, match="typical_len"):
            assert bench.choose(1)[1].choice == found[1].choice
        assert bench.ran == []
        assert [key["rows"] for key, _ in store.read()[0]] == [1]


def test_a_model_need_not_offer_ways(model):
    class Bare:
        decode = None

    with open_cache(model, 2) as cache:
        assert ways_of(Bare(), cache, 3) == {EAGER: None, "graph": None}  # type: ignore[arg-type]
        fused = FusedLlama(model, ops=reference_ops())
        assert isinstance(fused, OffersWays)
        assert list(ways_of(fused, cache, 3)) == [EAGER, "graph"]
        assert list(ways_of(Offering(model), cache, 3)) == [EAGER, "graph", "graph + persistent"]


def test_the_key_tells_models_caches_and_steps_apart(model):
    other = same_in_vattn(hf_model_of("llama", num_hidden_layers=3))
    with open_cache(model, 2) as cache, open_cache(other, 2) as other_cache:
        fused = FusedLlama(model)
        key = step_key(fused, cache, "reference", 2, 40)
        assert key == step_key(FusedLlama(model), cache, "reference", 2, 40)
        others = [
            step_key(FusedLlama(other), other_cache, "reference", 2, 40),
            step_key(FusedLlama(model, ops=fused_ops()), cache, "reference", 2, 40),
            step_key(fused, cache, "sdpa", 2, 40),
            step_key(fused, cache, "reference", 3, 40),
            step_key(fused, cache, "reference", 2, 41),
        ]
        assert len({tuple(each.items()) for each in [key, *others]}) == 6
        for fact in ("FusedLlama", "layers of", "heads", "KV heads of", "vocabulary", "float32"):
            assert fact in key["model"]


def test_with_and_without_dependent_launch(model):
    """A step of the operations' plain form, whose attention differs by that alone; the model itself keeps its own."""
    table = LinearTable({(4, 2, False): {1: None}}, pdl=True)
    assert fused_ops(table).plain.linear.__self__.entries == table.entries
    assert fused_ops(table).plain.linear.__self__.pdl is False
    assert fused_ops(LinearTable(table.entries)).plain is None

    seen = []

    class Watched(TritonDecodeAttention):
        def __call__(self, *args, **options):
            seen.append(("attention", self.pdl, self.block_n, id(self.workspaces)))
            return get("reference")(*args, **options)

    def watched(name: str, **more: object) -> Ops:
        def linear(*args, **options):
            seen.append((name,))
            return reference_ops().linear(*args, **options)

        return replace(reference_ops(), linear=linear, **more)

    fused = FusedLlama(model, ops=watched("own", plain=watched("plain")))
    attention = Watched(block_n=32, pdl=True, workspaces={})
    found = []
    with open_cache(model, 3) as cache, torch.inference_mode():
        slot = cache.acquire()
        run(model, cache, [slot], [[5, 6, 7, 8]])
        cache.ensure(slot, 5)
        rows = torch.tensor([4], dtype=torch.int32)
        batch = DecodeBatch(torch.tensor([slot], dtype=torch.int32), rows, rows + 1, cache.layout.max_seq_len)
        for name, compute in fused.ways(1, cache).items():
            seen.clear()
            logits = compute(fused.embedding[9:10].clone(), batch, attention)
            found.append((name, set(seen)))
            torch.testing.assert_close(logits, run(model, cache, [cache.acquire()], [[5, 6, 7, 8, 9]])[-1:])
    workspaces = id(attention.workspaces)
    assert found == [
        ("kernels", {("plain",), ("attention", False, 32, workspaces)}),
        ("dependent launch", {("own",), ("attention", True, 32, workspaces)}),
    ]
