"""The scheduler by itself: who is next, what fits, who gives way. No model, no cache, no clock but the test's."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from vattn import KVLayout, Request
from vattn.engine.costs import SequenceCosts
from vattn.engine.scheduler import Phase, Sample, Scheduler

PAGE_BYTES = 4096  # 16 rows
LAYOUT = KVLayout(2, 2, 8, 1024, torch.float32)
COSTS = SequenceCosts(LAYOUT, PAGE_BYTES)


class Bench:
    """A scheduler whose samples have rows where the test says so."""

    def __init__(self, max_batch: int = 8, num_pages: int = 1000, **options: float) -> None:
        self.scheduler = Scheduler(COSTS, max_batch, **options)
        self.num_bytes = num_pages * PAGE_BYTES
        self.rows: dict[Sample, int] = {}
        self.num_requests = 0

    def submit(
        self, prompt: int = 10, max_new: int = 10, at: float = 0.0, n: int = 1, **options: object
    ) -> list[Sample]:
        request = Request((1,) * prompt, max_new, n=n, **options)  # type: ignore[arg-type]
        deadline = float("inf") if request.deadline_s is None else at + request.deadline_s
        self.num_requests += 1
        samples = [Sample(self.num_requests, i, request, self.num_requests, at, deadline) for i in range(n)]
        for sample in samples:
            self.scheduler.add(sample)
        return samples

    @property
    def free(self) -> int:
        return self.num_bytes - sum(COSTS.bytes(rows) for rows in self.rows.values())

    def admit(self) -> list[Sample]:
        admitted = list(self.scheduler.admit(lambda: self.free, lambda sample: self.rows.get(sample, 0)))
        for sample in admitted:
            if sample.phase is Phase.PREFILLING:
                sample.slot = 1
                self.rows[sample] = 0
        return admitted

    def end(self, sample: Sample, by_itself: bool = True) -> None:
        if by_itself:
            self.scheduler.note_length(sample)
        self.rows.pop(sample, None)
        self.scheduler.discard(sample)


def test_costs() -> None:
    assert [COSTS.bytes(rows) // PAGE_BYTES for rows in (0, 1, 16, 17, 32, 33)] == [0, 1, 1, 2, 2, 3]
    assert [COSTS.shared_bytes(rows) // PAGE_BYTES for rows in (0, 15, 16, 31, 32)] == [0, 0, 1, 1, 2]
    assert [COSTS.rows_within(pages * PAGE_BYTES, 40) for pages in (0, 1, 2, 3)] == [0, 16, 32, 40]
    margin = SequenceCosts(LAYOUT, PAGE_BYTES, over_read_tokens=16)
    assert [margin.bytes(rows) // PAGE_BYTES for rows in (0, 1, 16, 17)] == [0, 2, 2, 3]
    large = SequenceCosts(LAYOUT, PAGE_BYTES, max_page_bytes=8 * PAGE_BYTES)  # a fork may have to copy the page it cuts
    assert [large.shared_bytes(16 * pages) // PAGE_BYTES for pages in (7, 8, 12, 32, 100)] == [7, 7, 10, 25, 93]
    layer = SequenceCosts(KVLayout(2, 2, 8, 1024, torch.float32, order="layer"), PAGE_BYTES)
    assert layer.bytes(1) == 4 * PAGE_BYTES  # K and V of two layers, each in pages of its own


def test_in_the_order_of_arrival() -> None:
    bench = Bench(max_batch=3)
    samples = [bench.submit()[0] for _ in range(5)]
    assert bench.admit() == samples[:3]
    assert (len(bench.scheduler.running), bench.scheduler.num_waiting) == (3, 2)
    bench.end(samples[1])
    assert bench.admit() == samples[3:4]


def test_those_who_were_not_asked_for_count_as_far_as_there_is_memory() -> None:
    """The next pass is larger for who is to come, but not for who has to wait for memory."""
    for num_pages, fitting in ((100, 7), (4, 1), (2, 0)):
        bench = Bench(num_pages=num_pages)
        for _ in range(9):
            bench.submit(prompt=17, max_new=10)  # two pages each
        scheduler = bench.scheduler
        assert next(scheduler.admit(lambda bench=bench: bench.free, lambda sample: 0)) in scheduler.running
        assert (scheduler.num_admissible, scheduler.num_fitting) == (7, fitting)


def test_a_higher_priority_goes_first() -> None:
    bench = Bench(max_batch=2)
    low, high, highest = (bench.submit(at=0.001 * i, priority=priority)[0] for i, priority in enumerate((-1, 5, 7)))
    assert bench.admit() == [highest, high]
    bench.end(high)
    assert bench.admit() == [low]


def test_one_that_waits_is_overtaken_for_a_while_only() -> None:
    """Ten seconds are worth a level: a stream of newer, more important ones starves nobody."""
    for priority, served_at in ((1, 10), (3, 30)):
        bench = Bench(max_batch=1)
        running = bench.submit(at=0.0, priority=9)[0]
        assert bench.admit() == [running]
        waiting = bench.submit(at=0.0)[0]
        for second in range(1, 100):
            bench.submit(at=float(second), priority=priority)
            bench.end(running)
            (running,) = bench.admit()
            if running is waiting:
                break
        # Those that came before second ``served_at`` go first; one a second comes, and one a second is served.
        assert served_at - 1 <= second <= served_at + 1


def test_admission_counts_what_running_samples_will_come_to() -> None:
    """Two of 32 + 64 rows, six pages each: ten pages are enough for their prompts, and not for both to end."""
    bench = Bench(num_pages=10)
    first, second = (bench.submit(33, 64)[0] for _ in range(2))
    assert bench.admit() == [first]
    bench.rows[first] = 33
    assert bench.admit() == []
    bench.num_bytes = 12 * PAGE_BYTES
    assert bench.admit() == [second]


def test_what_others_used_of_their_tokens_is_expected_of_the_next() -> None:
    bench = Bench(num_pages=100)
    assert bench.scheduler.expected_rows(bench.submit(17, 160)[0]) == 16 + 160
    for sample in bench.admit():
        bench.end(sample, by_itself=False)  # cancelled: it tells nothing
    for _ in range(300):
        (sample,) = bench.submit(10, 100)
        bench.admit()
        sample.answer = [1] * 20
        bench.end(sample)
    (sample,) = bench.submit(17, 160)
    assert bench.scheduler.expected_rows(sample) == pytest.approx(16 + 32, abs=2)
    sample.answer = [1] * 50  # has outlived that: nobody knows
    assert bench.scheduler.expected_rows(sample) == 16 + 160


def test_the_first_begins_where_there_is_room_for_its_prompt() -> None:
    bench = Bench(num_pages=3)
    (sample,) = bench.submit(33, 500)
    bench.num_bytes = 2 * PAGE_BYTES
    assert bench.admit() == []
    bench.num_bytes = 3 * PAGE_BYTES  # 32 rows of the prompt, and the row of its last token
    assert bench.admit() == [sample]


def test_a_head_that_does_not_fit_is_neither_overtaken_nor_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(num_pages=9)
    running, head, small = bench.submit(33, 64)[0], bench.submit(120, 20)[0], bench.submit(1, 1)[0]
    assert bench.admit() == [running]
    bench.rows[running] = 40
    assert bench.admit() == []
    monkeypatch.setattr(bench.scheduler, "expected_rows", lambda sample: 1 / 0)
    for _ in range(5):
        assert bench.admit() == []
    monkeypatch.undo()
    bench.end(running)
    assert bench.admit() == [head]
    bench.end(head)
    assert bench.admit() == [small]


def test_a_head_is_looked_at_again_after_a_preemption_that_frees_nothing() -> None:
    """Whoever gave way is not going to grow any more: that alone may be the room that the head needs."""
    bench = Bench(num_pages=8)
    running = bench.submit(10, 100)[0]
    assert bench.admit() == [running]
    head = bench.submit(33, 10, priority=5)[0]
    assert bench.admit() == []
    free = bench.free
    bench.rows.pop(running)
    assert bench.free == free
    bench.scheduler.requeue(running)
    assert bench.admit() == [head]


def test_a_preempted_sample_waits_until_it_fits() -> None:
    bench = Bench(num_pages=13)
    first, second = (bench.submit(33, 64)[0] for _ in range(2))
    assert bench.admit() == [first, second]
    bench.rows[first] = bench.rows[second] = 60
    bench.num_bytes = 8 * PAGE_BYTES  # others have taken the rest
    assert bench.scheduler.victim() is second
    second.answer = [1] * 27
    del bench.rows[second]
    life = second.life
    assert bench.scheduler.requeue(second) == [second]
    assert (second.phase, second.slot, second.computed, second.life) == (Phase.WAITING, -1, 0, life + 1)
    assert bench.admit() == []
    bench.num_bytes = 12 * PAGE_BYTES  # nobody has ended
    assert bench.admit() == [second]
    assert second.num_rows == 32 + 27


def test_the_victim_is_the_least_important_then_the_youngest() -> None:
    bench = Bench()
    samples = [bench.submit(at=0.01 * i, priority=p)[0] for i, p in enumerate((1, 0, 0, 2))]
    bench.admit()
    order = []
    while (victim := bench.scheduler.victim()) is not None:
        order.append(samples.index(victim))
        bench.scheduler.discard(victim)
    assert order == [2, 1, 0, 3]


def test_chunks_fill_the_budget_with_begun_prompts_first() -> None:
    bench = Bench()
    long, short, urgent = bench.submit(101)[0], bench.submit(6)[0], bench.submit(21, priority=5)[0]
    bench.admit()
    assert bench.scheduler.chunks(64) == [(urgent, 20), (long, 44)]
    long.computed = 44
    assert bench.scheduler.chunks(64) == [(long, 56), (urgent, 8)]
    long.computed, urgent.computed = 100, 20  # all are launched
    bench.scheduler.decode(urgent)
    assert bench.scheduler.chunks(64) == [(short, 5)]
    short.computed = 5
    assert bench.scheduler.chunks(64) == []


def test_rows_of_prompt_and_answer() -> None:
    sample = Sample(0, 0, Request((1, 2, 3), 10), 0, 0.0)
    assert (sample.num_prompt_rows, sample.num_rows, sample.tokens(0, 2)) == (2, 2, [1, 2])
    sample.answer = [7, 8, 9]
    assert sample.num_rows == 5
    assert sample.tokens(0, 5) == [1, 2, 3, 7, 8]
    assert [sample.tokens(i, j) for i, j in ((0, 3), (1, 4), (3, 5), (4, 5))] == [[1, 2, 3], [2, 3, 7], [7, 8], [8]]


def test_samples_of_a_request_follow_the_one_that_computes_the_prompt() -> None:
    bench = Bench(max_batch=3)
    first, second, third, fourth = bench.submit(33, 8, n=4)
    assert bench.admit() == [first, second, third]
    assert [each.phase for each in (first, second, third, fourth)] == [
        Phase.PREFILLING,
        Phase.FOLLOWING,
        Phase.FOLLOWING,
        Phase.WAITING,
    ]
    assert bench.scheduler.followers(first) == [second, third]
    assert bench.scheduler.chunks(100) == [(first, 32)]
    assert bench.scheduler.victim() is first  # the others hold nothing
    first.computed = 32
    for follower in (second, third):
        bench.scheduler.lead_no_more(follower)
        follower.slot, follower.computed = 2, 32
    for each in (first, second, third):
        bench.scheduler.decode(each)
    bench.end(second)
    assert bench.admit() == [fourth]
    assert fourth.phase is Phase.PREFILLING
    assert bench.scheduler.source_of(fourth) in (first, third)


@pytest.mark.parametrize("how", ["requeue", "discard"])
def test_followers_wait_again_when_their_leader_is_gone(how: str) -> None:
    bench = Bench(max_batch=3)
    first, second, third = bench.submit(33, 8, n=3)
    bench.admit()
    if how == "requeue":
        assert bench.scheduler.requeue(first) == [first, second, third]
        assert bench.scheduler.num_waiting == 3
        assert bench.admit() == [first, second, third]
    else:
        assert bench.scheduler.discard(first) == [second, third]
        assert bench.scheduler.num_waiting == 2
        assert bench.admit() == [second, third]
        assert (second.phase, third.phase, third.leader) == (Phase.PREFILLING, Phase.FOLLOWING, second)


def test_samples_that_share_a_prompt_are_not_counted_twice() -> None:
    """A prompt of 160 rows is ten pages; four samples of it, with a page each for their answers, fit into 14."""
    bench = Bench(num_pages=14)
    samples = bench.submit(161, 16, n=4)
    assert bench.admit() == samples
    apart = Bench(num_pages=14)
    for _ in range(4):
        apart.submit(161, 16)
    assert len(apart.admit()) == 1


def test_deadlines() -> None:
    bench = Bench(max_batch=1)
    early, late, never = bench.submit(deadline_s=1.0)[0], bench.submit(deadline_s=5.0)[0], bench.submit()[0]
    gone = bench.submit(deadline_s=2.0)[0]
    bench.admit()
    bench.scheduler.discard(gone)
    assert bench.scheduler.expired(0.9) == []
    assert bench.scheduler.expired(2.5) == [early]
    assert bench.scheduler.expired(2.6) == []
    assert bench.scheduler.expired(1e9) == [late]
    assert never in list(bench.scheduler)


def test_what_has_gone_does_not_pile_up() -> None:
    """A server that runs for weeks keeps no entry of requests that were cancelled while they waited."""
    bench = Bench(max_batch=1)
    bench.submit(1, 1)
    bench.admit()
    for i in range(5000):
        (sample,) = bench.submit(at=float(i), deadline_s=1e9)
        bench.scheduler.discard(sample)
    assert len(bench.scheduler._waiting) < 200
    assert len(bench.scheduler._deadlines) < 200
    assert bench.scheduler.num_waiting == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_random_life(seed: int) -> None:
    """Counts and phases agree whatever comes, and everybody is served."""
    rng = random.Random(seed)
    bench = Bench(max_batch=5, num_pages=40)
    scheduler = bench.scheduler
    alive: list[Sample] = []
    served: Counter[str] = Counter()
    for step in range(2000):
        if rng.random() < 0.3 and len(alive) < 60:
            options = {"priority": rng.randrange(3), "n": rng.choice((1, 1, 3))}
            alive += bench.submit(rng.randrange(1, 60), rng.randrange(1, 60), at=step / 10, **options)
        bench.admit()
        for sample, count in scheduler.chunks(32):
            sample.computed += count
            bench.rows[sample] = sample.computed
        for sample in [each for each in scheduler.running if each.phase is Phase.PREFILLING]:
            if sample.computed == sample.num_rows:
                for follower in scheduler.followers(sample):
                    scheduler.lead_no_more(follower)
                    follower.slot, follower.computed = 3, follower.num_prompt_rows
                    bench.rows[follower] = 0
                scheduler.decode(sample)
        for sample in [each for each in scheduler.running if each.phase is Phase.DECODING]:
            sample.answer.append(0)
            bench.rows[sample] = sample.num_rows
            if len(sample.answer) == sample.request.max_new_tokens or rng.random() < 0.02:
                served["ended"] += 1
                alive.remove(sample)
                bench.end(sample)
        while bench.free < 0:
            victim = scheduler.victim()
            assert victim is not None
            served["preempted"] += 1
            for each in scheduler.requeue(victim):
                bench.rows.pop(each, None)
        if alive and rng.random() < 0.05:
            sample = alive.pop(rng.randrange(len(alive)))
            bench.end(sample, by_itself=False)
        phases = Counter(sample.phase for sample in alive)
        assert scheduler.num_waiting == phases[Phase.WAITING]
        assert len(scheduler.running) == len(alive) - phases[Phase.WAITING] <= 5
        assert set(scheduler) == set(alive)
        assert all(each.leader in scheduler.running for each in alive if each.phase is Phase.FOLLOWING)
    assert served["ended"] > 100
