"""One step of everything: prompts that are done start to decode, those that decode get a token, the next pass goes out.

While the GPU is busy with the step before, the host gives slots away, maps what the next parts of prompts need, and
launches those together with the next token of everybody who decodes.
"""

from __future__ import annotations

from contextlib import suppress

from ..decode import DecodedToken, DecodeLoop, Start
from ..errors import ConfigError, DriverError, OutOfPages, OutOfSlots
from ..requests import Request, StepToken
from .prefill import Chunk, PrefillPasses, PromptPass
from .scheduler import Phase, Sample, Scheduler
from .stats import Meters

__all__ = ["Runner"]

_GROWN = "its slot was given more rows in the cache while the engine computed its prompt"
_CHANGED = "its slot was released or truncated in the cache while the engine used it"

# Of a sample with ``allowed_tokens``: its newest token is known and the next mask is to be made; it may take part in
# the next step; it took part in one whose token is not known yet.
_KNOWN, _READY, _AWAY = range(3)

# Of the budget while somebody decodes: what an idle GPU gets first, and how much more for each prompt that waits behind
# another for each sequence that decodes; in steps of so many tokens.
_FIRST, _PRESSING, _STEP = 4, 12, 256


class Runner:
    """Carries out what the scheduler says. For one thread; its caller puts signals off.

    Whatever goes wrong ends the samples that it went wrong for: their own ``allowed_tokens``, the pass or the decode
    step that they were part of, their slot. A shortage of memory or slots makes them wait.

    Args:
        loop: decodes.
        passes: compute prompts.
        scheduler: says who is next.
        meters: count.
        budgets: prompt tokens of a step while somebody decodes, and while nobody does.

    Attributes:
        reported: tokens and ends that nobody has collected yet.
    """

    def __init__(
        self,
        loop: DecodeLoop,
        passes: PrefillPasses,
        scheduler: Scheduler,
        meters: Meters,
        budgets: tuple[int, int],
    ) -> None:
        self._loop, self._cache, self._passes = loop, loop.cache, passes
        self._scheduler, self._meters = scheduler, meters
        self._busy_budget, self._idle_budget = budgets
        self.reported: list[StepToken] = []
        self._samples: dict[int, list[Sample]] = {}  # of requests that go on
        self._decoding: dict[int, Sample] = {}  # by slot
        self._grammars: dict[Sample, int] = {}  # those that decode with ``allowed_tokens``
        self._now = 0.0  # of the step
        self._shortage: OutOfPages | OutOfSlots | None = None  # why nothing of ours runs

    # -- requests ------------------------------------------------------------------------------------------------
    def add(self, request_id: int, request: Request, arrived_s: float) -> None:
        """A checked request arrives."""
        deadline = arrived_s + request.deadline_s if request.deadline_s is not None else float("inf")
        samples = [Sample(request_id, index, request, request_id, arrived_s, deadline) for index in range(request.n)]
        self._samples[request_id] = samples
        for sample in samples:
            self._scheduler.add(sample)

    def cancel(self, request_id: int) -> None:
        """Nothing of the request is reported any more; one that is unknown or has ended: no effect."""
        for sample in tuple(self._samples.get(request_id, ())):
            self._leave(sample)
        self.reported = [token for token in self.reported if token.request_id != request_id]

    def cancel_all(self) -> None:
        """Every request; nothing of any is reported any more."""
        for request_id in tuple(self._samples):
            self.cancel(request_id)

    def collect(self) -> list[StepToken]:
        """What there is to report, which is handed out by that."""
        tokens, self.reported = self.reported, []
        return tokens

    # -- a step --------------------------------------------------------------------------------------------------
    def advance(self, now: float) -> None:
        """One step; what it brings is in ``reported``.

        Raises:
            OutOfPages, OutOfSlots: others hold the memory or the slots, and nothing of ours runs. Whoever waits goes on
                waiting.
        """
        self._meters.num_steps += 1
        self._now, self._shortage = now, None
        for sample in self._scheduler.expired(now):
            self._end(sample, "deadline")
        self._admit()
        self._compute()
        if self._shortage is not None and not self._scheduler.running and not self.reported:
            raise self._shortage

    def _start(self, ready: list[Sample]) -> list[Sample]:
        """Decode these from now on; those that follow them fork first, while the slots hold the prompts and no more.
        Returns those that do decode."""
        followers = [(each, sample) for sample in ready for each in self._scheduler.followers(sample)]
        taken = [follower for follower, sample in followers if self._take_slot(follower, sample)]
        ready = ready + [follower for follower in taken if follower.computed == follower.num_rows]
        if lost := self._lost(ready):
            self._fail(lost, ConfigError(_CHANGED), gone=True)
            ready = [sample for sample in ready if sample.phase is Phase.PREFILLING]
        if grown := [sample for sample in ready if self._backed_rows(sample) != sample.num_rows]:
            self._fail(grown, ConfigError(_GROWN))
            ready = [sample for sample in ready if sample.phase is Phase.PREFILLING]
        while ready:
            try:
                self._loop.start_batch([self._start_of(sample) for sample in ready])
                break
            except OutOfPages as error:
                self._preempt(error)
                ready = [sample for sample in ready if sample.phase is Phase.PREFILLING]
            except Exception as error:
                self._fail(ready, error)
                return []
        for sample in ready:
            self._scheduler.decode(sample)
            self._decoding[sample.slot] = sample
            if sample.request.allowed_tokens is not None:
                self._grammars[sample] = _KNOWN
        return ready

    @staticmethod
    def _start_of(sample: Sample) -> Start:
        request, answer = sample.request, sample.answer
        return Start(
            sample.slot,
            answer[-1] if answer else request.prompt_tokens[-1],
            request.max_new_tokens - len(answer),
            None if request.sampling is None else request.sampling.for_sample(sample.index),
            request.stop_tokens,
            request.prompt_tokens,
            answer,
            request.num_logprobs,
        )

    def _compute(self) -> None:
        """A part of the prompts, and a token for everybody who decodes, in the same pass. Whose prompt that completes
        decodes in it already. Who has no page for the next row waits."""
        loop, may_retry, may_ride = self._loop, True, True
        while True:
            prompts, parts = self._next_pass() if may_ride else (None, [])
            begun = self._begin(parts)
            try:
                slots = self._slots_to_step()
            except BaseException:  # out of ``allowed_tokens``; no error of a request
                self._withdraw(begun)
                raise
            if any(sample.slot < 0 for sample, _ in parts):  # ended or preempted meanwhile
                self._withdraw(begun)
                continue
            if not self._decoding:
                self._launch_alone(*((prompts, parts) if may_ride else self._next_pass()))
                return
            try:
                tokens = loop.step(slots, prompts, None if prompts is None else prompts.versions)
                if loop.stream is None:  # nothing runs beside the host: there is nothing to be one step behind for
                    tokens += loop.drain()
            except OutOfPages as error:
                # What has ended meanwhile gives its memory back.
                ended = self._note(self._rest())
                self._withdraw(begun)
                if not ended:
                    self._preempt(error)
                continue
            except Exception as error:
                self._note(self._rest())
                self._withdraw(begun)
                lost = [sample for slot, sample in self._decoding.items() if slot not in loop.slots]
                if lost:  # as ``_lost``; the loop has dropped them
                    self._fail(lost, error, gone=True)
                elif isinstance(error, DriverError) and may_retry:
                    may_retry = False
                elif prompts is not None:
                    may_ride = False  # by themselves it shows whose fault it was
                else:
                    self._fail([s for slot, s in self._decoding.items() if slots is None or slot in slots], error)
                continue
            except BaseException:  # no error of a request: the same goes on with the next step
                self._withdraw(begun)
                raise
            for sample in self._grammars:
                if self._grammars[sample] == _READY:
                    self._grammars[sample] = _AWAY
            if prompts is not None and prompts.is_taken:
                self._computed(parts)
            self._note(tokens)
            if not may_ride:
                self._launch_alone(*self._next_pass())
            return

    def _begin(self, parts: list[tuple[Sample, int]]) -> list[Sample]:
        """Let those decode whose prompts a pass completes, before it is launched: a decode row finds what the same pass
        computes. Not those whom others follow: a fork copies rows at once."""
        complete = [sample for sample, count in parts if sample.computed + count == sample.num_rows]
        return self._start([sample for sample in complete if not self._scheduler.followers(sample)])

    def _withdraw(self, begun: list[Sample]) -> None:
        """The pass was not launched that ``_begin`` let them decode in."""
        for sample in begun:
            if not self._decodes_no_more(sample):  # it has ended, or was preempted
                continue
            is_lost = bool(self._lost([sample]))  # of which the next pass tells: the version there is not ours
            try:
                self._loop.cancel(sample.slot)
            except (OutOfPages, DriverError):  # of the row that it was to decode: all of its rows go
                self._give_back(sample)
                self._scheduler.requeue(sample)
                continue
            if not is_lost:
                with suppress(ConfigError):  # the cache is closed
                    sample.version = int(self._cache.versions([sample.slot])[0])
            self._scheduler.prefill(sample)

    def _rest(self) -> list[DecodedToken]:
        """Of steps that are launched already, after something was raised; none where the device has failed."""
        with suppress(Exception):
            return self._loop.drain()
        return []

    def _slots_to_step(self) -> list[int] | None:
        """Those that take part in the next step: all (None), but for those whose next mask cannot be made yet."""
        if not self._grammars:
            return None
        for sample in [sample for sample, state in self._grammars.items() if state == _KNOWN]:
            try:
                assert sample.request.allowed_tokens is not None
                self._loop.allow(sample.slot, sample.request.allowed_tokens(tuple(sample.answer)))
                self._grammars[sample] = _READY
            except Exception as error:
                self._fail([sample], error)
        return [slot for slot, sample in self._decoding.items() if self._grammars.get(sample) != _AWAY]

    def _note(self, tokens: list[DecodedToken]) -> bool:
        """Report tokens; True if a sample ended."""
        ended: list[Sample] = []
        gaps: dict[float, int] = {}
        now = self._now
        num_tokens = 0
        for token in tokens:
            sample = self._decoding.get(token.slot)
            if sample is None:
                continue
            if token.token is None:
                error = RuntimeError("no token could be chosen: each one was forbidden, or its logit was NaN")
                self._fail([sample], error)
                continue
            if sample.answer:
                gaps[sample.last_s] = gaps.get(sample.last_s, 0) + 1
            else:
                self._meters.first_token_s.add(now - sample.arrived_s)
            num_tokens += 1
            sample.last_s = now
            sample.answer.append(token.token)
            logprobs, reason = token.top_logprobs, token.finish_reason
            self.reported.append(
                StepToken(sample.request_id, sample.index, token.token, token.logprob, logprobs, reason)
            )
            if reason is not None:
                ended.append(sample)
            elif sample in self._grammars:
                self._grammars[sample] = _KNOWN
        for last_s, times in gaps.items():
            self._meters.between_tokens_s.add(now - last_s, times)
        self._meters.note_tokens(num_tokens, now)
        for sample in ended:
            self._scheduler.note_length(sample)
            self._leave(sample)
        return bool(ended)

    # -- slots and memory ----------------------------------------------------------------------------------------
    def _admit(self) -> None:
        """Give slots to those whose turn it is."""
        scheduler = self._scheduler
        if not scheduler.num_waiting or self._shortage is not None:
            return
        try:
            admitted = scheduler.admit(self._free_bytes, self._backed_rows)
        except ConfigError as error:  # the cache was closed
            self._fail(list(scheduler), error)
            return
        for sample in admitted:
            if sample.phase is not Phase.PREFILLING:
                continue  # it follows another, or could not
            if self._shortage is not None:
                scheduler.requeue(sample)
            else:
                self._take_slot(sample, scheduler.source_of(sample))
        self._start([s for s in admitted if s.phase is Phase.PREFILLING and s.slot >= 0 and s.computed == s.num_rows])
        if not scheduler.running and self._shortage is None and (head := scheduler.head) is not None:
            asked, free, limit = scheduler.least_bytes(head), self._free_bytes(), self._cache.memory_limit
            self._shortage = OutOfPages(
                f"request {head.request_id} needs {asked} bytes to begin with; {free} of {limit} bytes are free, and "
                "nothing of this engine runs: others hold slots of its cache",
                asked_bytes=asked,
                free_bytes=free,
                limit_bytes=limit,
            )

    def _take_slot(self, sample: Sample, source: Sample | None) -> bool:
        """A slot for a sample: an empty one, or a fork of another's of the same request. False: it waits again."""
        rows = sample.num_prompt_rows
        try:
            if source is not None and rows:
                slot, computed = self._cache.fork(source.slot, rows), rows
            else:
                slot, computed = self._cache.acquire(expect_len=self._scheduler.expected_rows(sample)), 0
        except (OutOfPages, OutOfSlots) as error:
            self._scheduler.requeue(sample)
            self._shortage = error
            return False
        except Exception as error:
            self._fail([sample], error)
            return False
        if (former := self._decoding.get(slot)) is not None:  # its slot was released behind our back
            self._loop.cancel(slot)
            self._fail([former], ConfigError(_CHANGED), gone=True)
        if sample.phase is Phase.FOLLOWING:
            self._scheduler.lead_no_more(sample)
        sample.slot, sample.computed = slot, computed
        sample.version = int(self._cache.versions([slot])[0])
        if not sample.was_admitted:
            sample.was_admitted = True
            self._meters.queue_s.add(self._now - sample.arrived_s)
        return True

    def _launch_alone(self, prompts: PromptPass | None, parts: list[tuple[Sample, int]]) -> None:
        """A pass that nobody decodes in, if there is one."""
        if prompts is None:
            return
        try:
            self._passes.launch(prompts)
        except Exception as error:
            self._fail_parts(parts, error)
        else:
            self._computed(parts)

    def _next_pass(self) -> tuple[PromptPass | None, list[tuple[Sample, int]]]:
        """The next parts of prompts, backed, and (sample, rows) of each; None and nothing where none is to be
        computed."""
        while parts := self._scheduler.chunks(self._budget):
            chunks = [
                Chunk(sample.slot, sample.version, sample.tokens(sample.computed, end), end)
                for sample, end in ((sample, sample.computed + count) for sample, count in parts)
            ]
            try:
                return self._passes.prepare(chunks), parts
            except OutOfPages as error:
                self._preempt(error)
            except Exception as error:
                self._fail_parts(parts, error)
        return None, []

    def _fail_parts(self, parts: list[tuple[Sample, int]], error: Exception) -> None:
        """Of a pass: those whose slots are lost, or all."""
        took_part = [sample for sample, _ in parts]
        lost = self._lost(took_part)
        self._fail(lost or took_part, error, gone=bool(lost))

    @property
    def _budget(self) -> int:
        """Prompt tokens of the next pass: the more prompts wait behind one, for each sequence that decodes and so waits
        for the pass, the larger it is. One that an idle GPU waits for is small: while it runs, the pages of the next
        one are mapped."""
        num_decoding = len(self._decoding)
        if not num_decoding:
            return min(self._idle_budget, _FIRST * self._busy_budget) if self._passes.idle else self._idle_budget
        pressing = max(1, _PRESSING * (self._scheduler.num_prefilling - 1) / num_decoding)
        budget = min(self._idle_budget, int(pressing * self._busy_budget) // _STEP * _STEP or self._busy_budget)
        return self._passes.room(budget, self._loop.rows_beside(min(num_decoding + 1, self._loop.max_batch)))

    def _computed(self, parts: list[tuple[Sample, int]]) -> None:
        """These rows are there for whatever is launched from now on. Whose prompt that completes starts to decode."""
        for sample, count in parts:
            sample.computed += count
            self._meters.num_prefill_tokens += count
        complete = [sample for sample, _ in parts if sample.computed == sample.num_rows]
        self._start([sample for sample in complete if sample.phase is Phase.PREFILLING])

    def _preempt(self, error: OutOfPages) -> None:
        """Take a sample's memory back; its rows are computed again when they fit."""
        victim = self._scheduler.victim()
        if victim is not None:
            self._give_back(victim)
            self._scheduler.requeue(victim)
            self._meters.num_preemptions += 1
        if not self._scheduler.running:
            self._shortage = error

    def _lost(self, samples: list[Sample]) -> list[Sample]:
        """Those whose slots somebody else has released or truncated behind our back: they are not ours any more."""
        with suppress(ConfigError):  # the cache is closed: that is everybody's fate
            versions = self._cache.versions([sample.slot for sample in samples]).tolist()
            return [sample for sample, version in zip(samples, versions, strict=True) if version != sample.version]
        return []

    def _free_bytes(self) -> int:
        return self._cache.memory_limit - self._cache.stats().in_use_bytes

    def _backed_rows(self, sample: Sample) -> int:
        with suppress(ConfigError):  # its slot was released behind our back, of which the next step tells
            return self._cache.seq_len(sample.slot) if sample.slot >= 0 else 0
        return sample.computed

    # -- ends ----------------------------------------------------------------------------------------------------
    def _fail(self, samples: list[Sample], error: Exception, gone: bool = False) -> None:
        """They end with an error, and so do those that wait for their prompts."""
        for sample in samples:
            if sample.phase is not Phase.ENDED:
                followers = self._scheduler.followers(sample)
                if gone:
                    self._decodes_no_more(sample)
                    sample.slot = -1
                self._end(sample, "error", error)
                self._fail(followers, error)

    def _end(self, sample: Sample, reason: str, error: Exception | None = None) -> None:
        self.reported.append(StepToken(sample.request_id, sample.index, None, finish_reason=reason, error=error))
        self._leave(sample)

    def _leave(self, sample: Sample) -> None:
        """It waits and runs no more."""
        self._give_back(sample)
        self._scheduler.discard(sample)
        samples = self._samples[sample.request_id]
        samples.remove(sample)
        if not samples:
            del self._samples[sample.request_id]

    def _give_back(self, sample: Sample) -> None:
        """Its slot, if it has one."""
        decodes = self._decodes_no_more(sample)
        slot, sample.slot = sample.slot, -1
        if slot < 0:
            return
        with suppress(ConfigError):  # the cache is closed, or the slot is somebody else's by now
            if not decodes:
                if self._cache.versions([slot])[0] == sample.version:
                    self._cache.release(slot)
                return
            try:
                self._loop.release(slot)
            except (OutOfPages, DriverError):  # of what lies past the end of its rows
                self._cache.release(slot)

    def _decodes_no_more(self, sample: Sample) -> bool:
        """For the books of this; whether it did. Another one decodes in its slot where somebody has released that."""
        self._grammars.pop(sample, None)
        if decodes := self._decoding.get(sample.slot) is sample:
            del self._decoding[sample.slot]
        return decodes
