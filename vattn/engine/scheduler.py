"""Who gets a slot, which part of which prompt is computed next, and who gives memory back. Plain data, no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from heapq import heapify, heappop, heappush

import numpy as np

from ..requests import Request
from .costs import SequenceCosts

__all__ = ["Phase", "Sample", "Scheduler"]

AGEING_S = 10.0  # of waiting are worth one level of priority
_WEIGHT = 1 / 16  # of the newest sequence in what is expected of the next


class Phase(Enum):
    """Where a sample is on its way."""

    WAITING = "waiting"  # holds nothing
    FOLLOWING = "following"  # is going to fork from another sample, whose prompt is being computed
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


@dataclass(eq=False, slots=True)
class Sample:
    """One of a request's ``n`` samples.

    Attributes:
        request: checked.
        arrived_s: when it was submitted.
        order: of its arrival.
        deadline_s: when it has to end.
        answer: its tokens so far. Those of prompt and answer but for the last one have rows while it decodes.
        slot: while it prefills or decodes.
        version: the cache's, of that slot: another one there means that somebody else has changed or taken it.
        computed: rows whose computation was launched.
        cached: rows that were there when it was first given a slot.
        life: one more each time that it gave its slot back.
        last_s: when its newest token was reported.
        leader, followers: whom it follows, and who follows it.
        shared_rows: without a slot: its first rows, which a running sample has or will have. It follows until then.
    """

    request_id: int
    index: int
    request: Request
    order: int
    arrived_s: float
    deadline_s: float = math.inf
    rank: float = 0.0
    answer: list[int] = field(default_factory=list)
    phase: Phase = Phase.WAITING
    slot: int = -1
    version: int = -1
    computed: int = 0
    life: int = 0
    last_s: float = 0.0
    was_admitted: bool = False
    cached: int = 0
    leader: Sample | None = None
    followers: dict[Sample, None] = field(default_factory=dict)
    shared_rows: int = 0
    _prompt: np.ndarray | None = None

    @property
    def num_prompt_rows(self) -> int:
        """Rows that all samples of its request begin with. The prompt's last token is the first to be decoded."""
        return len(self.request.prompt_tokens) - 1

    @property
    def num_rows(self) -> int:
        """Rows that have to be there before it decodes."""
        return self.num_prompt_rows + len(self.answer)

    def tokens(self, start: int, end: int) -> list[int]:
        """Of prompt and answer, those in these rows."""
        prompt = self.request.prompt_tokens
        if end <= len(prompt):
            return list(prompt[start:end])
        split = len(prompt)
        return [*prompt[start:], *self.answer[max(0, start - split) : end - split]]

    def token_array(self) -> np.ndarray:
        """Those of ``num_rows``, int32."""
        if self._prompt is None:
            self._prompt = np.array(self.request.prompt_tokens, np.int32)
        whole = np.concatenate((self._prompt, np.array(self.answer, np.int32))) if self.answer else self._prompt
        return whole[: self.num_rows]

    def goes_before(self, other: Sample) -> bool:
        """Whether its rows are computed first."""
        return self.computed > 0 or self.order_key < other.order_key

    @property
    def order_key(self) -> tuple[float, int, int]:
        """Smaller goes first."""
        return self.rank, self.order, self.index


class Scheduler:
    """Continuous batching over samples.

    A waiting sample goes by its rank: when it arrived, in units of ``ageing_s``, less its priority. The rank does not
    change, so one that waits is overtaken for ``ageing_s`` by what has one more level of priority, and not longer.

    Args:
        costs: bytes of sequences.
        max_batch: samples that may have a slot.
        ageing_s: seconds of waiting that are worth one level of priority.
        running_rows: says of a sample that waits how many of its rows a running one has or will have.

    Attributes:
        running: samples that have a slot or follow another, in the order of their admission.
    """

    def __init__(
        self,
        costs: SequenceCosts,
        max_batch: int,
        ageing_s: float = AGEING_S,
        running_rows: Callable[[Sample], int] = lambda sample: 0,
    ) -> None:
        self._running_rows = running_rows
        self.costs, self.max_batch, self.ageing_s = costs, max_batch, ageing_s
        self.running: dict[Sample, None] = {}
        self.num_waiting = 0
        self._waiting: list[tuple[float, int, int, int, Sample]] = []  # a heap; entries of older lives are skipped
        self._deadlines: list[tuple[float, int, int, Sample]] = []
        self._families: dict[int, list[Sample]] = {}  # the samples of requests that have several
        self._prefilling: dict[Sample, None] = {}
        self._refused: tuple[Sample, int] | None = None  # the head that did not fit, and the bytes free since
        self._planned, self._free = 0, 0  # bytes that all who run may still come to, and that nobody used, in ``admit``
        self._share, self._variance = 1.0, 0.0  # of max_new_tokens that samples come to use

    # -- coming and going ----------------------------------------------------------------------------------------
    def add(self, sample: Sample) -> None:
        """A new sample waits."""
        sample.rank = sample.arrived_s / self.ageing_s - sample.request.priority
        if sample.deadline_s < math.inf:
            heappush(self._deadlines, (sample.deadline_s, sample.order, sample.index, sample))
        if sample.request.n > 1:
            self._families.setdefault(sample.request_id, []).append(sample)
        self._wait(sample)

    def requeue(self, sample: Sample) -> list[Sample]:
        """It has given its slot back and waits again; so do those that follow it, which are returned with it."""
        found = [sample, *self._train(sample)]
        for each in found:
            self._stop(each)
            each.computed = 0
            self._wait(each)
        return found

    def discard(self, sample: Sample) -> list[Sample]:
        """It has ended, and its slot is given back. Those that followed it wait again; they are returned."""
        followers = self._train(sample)
        if sample.phase is Phase.WAITING:
            self.num_waiting -= 1
        self._stop(sample)
        sample.phase = Phase.ENDED
        family = self._families.get(sample.request_id)
        if family is not None:
            family.remove(sample)
            if not family:
                del self._families[sample.request_id]
        for each in followers:
            self._stop(each)
            self._wait(each)
        self._tidy()
        return followers

    def note_length(self, sample: Sample) -> None:
        """It ended by itself: what it used of its ``max_new_tokens`` tells what others may come to."""
        used = len(sample.answer) / sample.request.max_new_tokens - self._share
        self._share += _WEIGHT * used
        self._variance = (1 - _WEIGHT) * (self._variance + _WEIGHT * used * used)

    def expired(self, now: float) -> list[Sample]:
        """Those whose deadline has come; each is told once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            sample = heappop(self._deadlines)[-1]
            if sample.phase is not Phase.ENDED:
                found.append(sample)
        return found

    # -- who goes on ---------------------------------------------------------------------------------------------
    @property
    def head(self) -> Sample | None:
        """The waiting sample whose turn it is."""
        while self._waiting:
            *_, life, sample = self._waiting[0]
            if sample.phase is Phase.WAITING and sample.life == life:
                return sample
            heappop(self._waiting)
        return None

    def admit(self, free_bytes: Callable[[], int], backed_rows: Callable[[Sample], int]) -> Iterator[Sample]:
        """Take samples off the queue as long as what all who run may come to, and they, fit into free memory.

        One that does not fit is not overtaken, and not looked at again before more is free or somebody has ended.
        Where nothing runs, whoever can begin to decode is taken. Who stops asking leaves the others waiting.

        Args:
            free_bytes: physical memory that nobody uses.
            backed_rows: of a sample with a slot, rows that have pages.

        Yields:
            One at a time, PREFILLING now and without a slot yet, or FOLLOWING.
        """
        if not self.num_waiting or len(self.running) >= self.max_batch:
            return
        head, free = self.head, free_bytes()
        if self._refused is not None and self._refused[0] is head and free <= self._refused[1]:
            self._refused = head, free  # those who run grow into what is free, and need less from then on
            return
        self._refused = None
        costs = self.costs
        growth = sum(self._cost(each) - costs.bytes(min(backed_rows(each), self.expected_rows(each)))
                     for each in self.running)  # fmt: skip
        self._planned, self._free = growth, free
        while head is not None and len(self.running) < self.max_batch:
            head.shared_rows = head.num_prompt_rows if self._has_relative(head) else self._running_rows(head)
            growth += self._cost(head)
            if growth > free and (self.running or self.least_bytes(head) > free):
                self._refused = head, free
                return
            heappop(self._waiting)
            self._planned = growth
            self.num_waiting -= 1
            self.running[head] = None
            leader = self._leader_of(head)
            if leader is None:
                self.prefill(head)
            else:
                self.follow(head, leader, head.num_prompt_rows)
            yield head
            head = self.head

    def expected_rows(self, sample: Sample) -> int:
        """Rows that it probably comes to: as many of its ``max_new_tokens`` as others needed of theirs, and a deviation
        more; all of them once it has outlived that."""
        most = sample.request.max_new_tokens
        share = min(1.0, self._share + math.sqrt(self._variance))
        expected = math.ceil(share * most)
        return sample.num_prompt_rows + (expected if len(sample.answer) < expected else most)

    def least_bytes(self, sample: Sample) -> int:
        """To begin to decode with."""
        return self.costs.bytes(sample.num_rows + 1)

    def source_of(self, sample: Sample) -> Sample | None:
        """A sample of the same request whose slot has all rows of the prompt."""
        for other in self._families.get(sample.request_id, ()):
            if other.phase is Phase.DECODING:
                return other
        return None

    def followers(self, sample: Sample) -> list[Sample]:
        """Those that are going to fork from it."""
        return list(sample.followers)

    def follow(self, sample: Sample, leader: Sample, rows: int) -> None:
        """Wait for so many rows of another sample."""
        self._lead(sample, leader)
        sample.phase, sample.shared_rows = Phase.FOLLOWING, rows
        self._prefilling.pop(sample, None)

    def lead_no_more(self, sample: Sample) -> None:
        """A follower is on its own now, to be given a slot."""
        self._lead(sample, None)
        self.prefill(sample)

    def decode(self, sample: Sample) -> None:
        """All rows of its prompt are computed."""
        sample.phase = Phase.DECODING
        self._prefilling.pop(sample, None)

    def prefill(self, sample: Sample) -> None:
        """It does not decode yet, after all: rows of its prompt are not computed."""
        sample.phase = Phase.PREFILLING
        self._prefilling[sample] = None

    @property
    def num_admissible(self) -> int:
        """Samples that wait and that ``max_batch`` leaves room for."""
        return min(self.num_waiting, self.max_batch - len(self.running))

    @property
    def num_fitting(self) -> int:
        """Of those, as many as ``admit``, which was not asked for them, would find memory for: about so many."""
        head = self.head
        if head is None:
            return 0
        return min(self.num_admissible, max(0, self._free - self._planned) // max(1, self._cost(head)))

    @property
    def num_prefilling(self) -> int:
        return len(self._prefilling)

    @property
    def num_prefilling_rows(self) -> int:
        """Rows that are to be computed of those prompts."""
        return sum(sample.num_rows - sample.computed for sample in self._prefilling)

    def chunks(self, budget: int) -> list[tuple[Sample, int]]:
        """(sample, rows) to compute next, ``budget`` rows together: prompts that were begun, then by rank."""
        found = []
        for sample in sorted(self._prefilling, key=lambda each: (each.computed == 0, each.order_key)):
            count = min(budget, sample.num_rows - sample.computed)
            if count > 0:
                found.append((sample, count))
                budget -= count
            if budget <= 0:
                break
        return found

    def victim(self) -> Sample | None:
        """Who gives memory back when it runs out: of those that have any, the one whose turn would come last."""
        holders = (each for each in self.running if each.slot >= 0)
        return max(holders, key=lambda each: each.order_key, default=None)

    # -- inside --------------------------------------------------------------------------------------------------
    def _wait(self, sample: Sample) -> None:
        sample.phase = Phase.WAITING
        heappush(self._waiting, (*sample.order_key, sample.life, sample))
        self.num_waiting += 1

    def _stop(self, sample: Sample) -> None:
        sample.life += 1
        sample.slot = -1
        self._lead(sample, None)
        self.running.pop(sample, None)
        self._prefilling.pop(sample, None)
        self._refused = None

    def _tidy(self) -> None:
        """Entries of samples that are gone do not pile up."""
        if len(self._waiting) > 2 * self.num_waiting + 64:
            self._waiting = [
                each for each in self._waiting if each[-1].phase is Phase.WAITING and self._is_of_now(each)
            ]
            heapify(self._waiting)
        if len(self._deadlines) > 2 * (self.num_waiting + len(self.running)) + 64:
            self._deadlines = [each for each in self._deadlines if each[-1].phase is not Phase.ENDED]
            heapify(self._deadlines)

    @staticmethod
    def _is_of_now(entry: tuple[float, int, int, int, Sample]) -> bool:
        return entry[3] == entry[4].life

    @staticmethod
    def _lead(sample: Sample, leader: Sample | None) -> None:
        if sample.leader is not None:
            del sample.leader.followers[sample]
        if leader is not None:
            leader.followers[sample] = None
        sample.leader = leader

    def _train(self, sample: Sample) -> list[Sample]:
        """Those that follow it, and those that follow them."""
        found = self.followers(sample)
        for each in found:
            found += self.followers(each)
        return found

    def _leader_of(self, sample: Sample) -> Sample | None:
        family = self._families.get(sample.request_id, ())
        if any(each.phase is Phase.DECODING for each in family):
            return None  # forks at once
        return next((each for each in family if each is not sample and each.phase is Phase.PREFILLING), None)

    def _cost(self, sample: Sample) -> int:
        """Bytes that it probably comes to, less the pages that it shares with a running sample."""
        cost = self.costs.bytes(self.expected_rows(sample))
        return cost if sample.slot >= 0 else cost - self.costs.shared_bytes(sample.shared_rows)

    def _has_relative(self, sample: Sample) -> bool:
        family = self._families.get(sample.request_id, ())
        return any(each is not sample and each.phase in (Phase.PREFILLING, Phase.DECODING) for each in family)

    def __iter__(self) -> Iterator[Sample]:
        """All that wait or run."""
        yield from self.running
        for entry in self._waiting:
            if entry[-1].phase is Phase.WAITING and self._is_of_now(entry):
                yield entry[-1]
