"""One step of everything: prompts that are done start to decode, those that decode get a token, the next pass goes out.

While the GPU is busy with the step before, the host gives slots away, maps what the next parts of prompts need, and
launches those together with the next token of everybody who decodes.
"""

from __future__ import annotations

import time
from contextlib import suppress

from ..decode import DecodedToken, DecodeLoop, Start
from ..errors import ConfigError, DriverError, OutOfPages
from .admission import Admission
from .pace import Pace
from .prefill import Chunk, PrefillPasses, PromptPass
from .prefixes import Prefixes
from .samples import AWAY, CHANGED, KNOWN, READY, Samples
from .scheduler import Phase, Sample, Scheduler
from .stats import Meters

__all__ = ["Runner"]

_GROWN = "its slot was given more rows in the cache while the engine computed its prompt"

# In budgets of a step while somebody decodes: what an idle GPU gets first, and what n prompts that wait behind another
# weigh, n² times this, against a sequence that decodes; and what several get that are more than that. In steps of so
# many tokens.
_FIRST, _PRESSING, _SEVERAL, _STEP = 4, 3, 2, 256
_NAP_S = 1e-3  # of a call of ``advance`` that launches nothing yet
_LONG_S = 5e-3  # that an idle GPU waits for others' slots, when there is a pass to compute


class Runner:
    """Carries out what the scheduler says. For one thread; its caller puts signals off.

    Whatever goes wrong ends the samples that it went wrong for: their own ``allowed_tokens``, the pass or the decode
    step that they were part of, their slot. A shortage of memory or slots makes them wait.

    Args:
        samples: the books, in which a step leaves what it brings.
        loop: decodes.
        passes: compute prompts.
        scheduler: says who is next.
        prefixes: what sequences can begin with.
        meters: count.
        budgets: prompt tokens of a step while somebody decodes, and while nobody does.
    """

    def __init__(
        self,
        samples: Samples,
        loop: DecodeLoop,
        passes: PrefillPasses,
        scheduler: Scheduler,
        prefixes: Prefixes,
        meters: Meters,
        budgets: tuple[int, int],
    ) -> None:
        self._samples, self._loop, self._cache, self._passes = samples, loop, loop.cache, passes
        self._scheduler, self._meters = scheduler, meters
        self._busy_budget, self._idle_budget = budgets
        self._pace = Pace()
        self._admission = Admission(samples, scheduler, prefixes, self._enough, self._is_starved)

    def advance(self, now: float) -> None:
        """One step, or none while a pass of prompts runs and somebody may still come for the next; ``Samples.collect``
        returns what it brings.

        Raises:
            OutOfPages, OutOfSlots: others hold the memory or the slots, and nothing of ours runs. Whoever waits goes on
                waiting.
        """
        samples = self._samples
        samples.now = now
        if samples.decoding and (early := self._pace.early_s()) > 0 and self._is_busy:
            if not self._admit(at_most=1):
                time.sleep(min(early, _NAP_S))
            return
        self._meters.num_steps += 1
        samples.shortage = None
        for sample in self._scheduler.expired(now):
            samples.end(sample, "deadline")
        self._admit()
        self._compute()
        if samples.shortage is not None and not self._scheduler.running and not samples.reported:
            raise samples.shortage

    def _admit(self, at_most: int | None = None) -> bool:
        """Give slots to those whose turn it is; returns whether there was anybody."""
        samples, scheduler = self._samples, self._scheduler
        try:
            admitted = self._admission.admit(at_most)
        except ConfigError as error:  # the cache was closed
            samples.fail(list(scheduler), error)
            return True
        self._start([s for s in admitted if s.phase is Phase.PREFILLING and s.slot >= 0 and s.computed == s.num_rows])
        if not scheduler.running and samples.shortage is None and (head := scheduler.head) is not None:
            asked, free, limit = scheduler.least_bytes(head), samples.free_bytes(), self._cache.memory_limit
            samples.shortage = OutOfPages(
                f"request {head.request_id} needs {asked} bytes to begin with; {free} of {limit} bytes are free, and "
                "nothing of this engine runs: others hold slots of its cache",
                asked_bytes=asked,
                free_bytes=free,
                limit_bytes=limit,
            )
        return bool(admitted)

    def _start(self, ready: list[Sample]) -> list[Sample]:
        """Decode these from now on; those that follow them fork first, while the slots hold the prompts and no more.
        Returns those that do decode."""
        led = ready
        while led := self._admission.wake(led):
            ready = ready + led
        if lost := self._samples.lost(ready):
            self._samples.fail(lost, ConfigError(CHANGED), gone=True)
            ready = [sample for sample in ready if sample.phase is Phase.PREFILLING]
        if grown := [sample for sample in ready if self._samples.backed_rows(sample) != sample.num_rows]:
            self._samples.fail(grown, ConfigError(_GROWN))
            ready = [sample for sample in ready if sample.phase is Phase.PREFILLING]
        while ready:
            try:
                self._loop.start_batch(
                    [self._start_of(sample) for sample in ready], [sample.version for sample in ready]
                )
                break
            except OutOfPages as error:
                self._samples.preempt(error)
                ready = [sample for sample in ready if sample.phase is Phase.PREFILLING]
            except Exception as error:
                lost = self._samples.lost(ready)
                self._samples.fail(lost or ready, error, gone=bool(lost))
                ready = [sample for sample in ready if sample.phase is Phase.PREFILLING]
        for sample in ready:
            self._scheduler.decode(sample)
            self._samples.decoding[sample.slot] = sample
            if sample.request.allowed_tokens is not None:
                self._samples.grammars[sample] = KNOWN
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

    # -- decoding, and passes ------------------------------------------------------------------------------------
    def _compute(self) -> None:
        """A part of the prompts, and a token for everybody who decodes, in the same pass. Whose prompt that completes
        decodes in it already. Who has no page for the next row waits."""
        loop, samples, may_retry, may_ride = self._loop, self._samples, True, True
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
            if not samples.decoding:
                self._launch_alone(*((prompts, parts) if may_ride else self._next_pass()))
                return
            too_late = self._pace.has_waited and not self._is_busy
            try:
                tokens = loop.step(slots, prompts, None if prompts is None else prompts.versions)
                if loop.stream is None:  # nothing runs beside the host: there is nothing to be one step behind for
                    tokens += loop.drain()
            except OutOfPages as error:
                # What has ended meanwhile gives its memory back.
                ended = samples.note(self._rest())
                self._withdraw(begun)
                if not ended:
                    samples.preempt(error)
                continue
            except Exception as error:
                samples.note(self._rest())
                self._withdraw(begun)
                lost = [sample for slot, sample in samples.decoding.items() if slot not in loop.slots]
                if lost:  # as ``Samples.lost``; the loop has dropped them
                    samples.fail(lost, error, gone=True)
                elif isinstance(error, DriverError) and may_retry:
                    may_retry = False
                elif prompts is not None:
                    may_ride = False  # by themselves it shows whose fault it was
                else:
                    samples.fail([s for slot, s in samples.decoding.items() if slots is None or slot in slots], error)
                continue
            except BaseException:  # no error of a request: the same goes on with the next step
                self._withdraw(begun)
                raise
            for sample in samples.grammars:
                if samples.grammars[sample] == READY:
                    samples.grammars[sample] = AWAY
            if prompts is not None and prompts.is_taken:
                self._computed(parts)
            samples.note(tokens)
            if loop.stream is not None and (prompts is None or prompts.is_taken):
                self._pace.launched(0 if prompts is None else prompts.num_rows(len(samples.decoding)), too_late)
            if not may_ride:
                self._launch_alone(*self._next_pass())
            return

    @property
    def _is_busy(self) -> bool:
        """Whether a device beside the host has something to do; not of one that has failed, as the next step tells."""
        with suppress(Exception):
            return self._loop.stream is not None and not self._loop.stream.query()
        return False

    def _is_starved(self, rows: int, waited_s: float) -> bool:
        """Whether a device has nothing to do, and should get a pass of so many rows, or the next tokens, now."""
        if self._loop.stream is None or waited_s <= _LONG_S:
            return False
        return (rows >= self._busy_budget or bool(self._samples.decoding)) and not self._is_busy

    def _begin(self, parts: list[tuple[Sample, int]]) -> list[Sample]:
        """Let those decode whose prompts a pass completes, before it is launched: a decode row finds what the same pass
        computes. Not those whom others follow: a fork copies rows at once."""
        complete = [sample for sample, count in parts if sample.computed + count == sample.num_rows]
        return self._start([sample for sample in complete if not self._scheduler.followers(sample)])

    def _withdraw(self, begun: list[Sample]) -> None:
        """The pass was not launched that ``_begin`` let them decode in."""
        for sample in begun:
            if not self._samples.decodes_no_more(sample):  # it has ended, or was preempted
                continue
            is_lost = bool(self._samples.lost([sample]))  # of which the next pass tells: the version there is not ours
            try:
                self._loop.cancel(sample.slot)
            except (OutOfPages, DriverError):  # of the row that it was to decode: all of its rows go
                self._samples.give_back(sample, store=False)
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
        if not self._samples.grammars:
            return None
        for sample in [sample for sample, state in self._samples.grammars.items() if state == KNOWN]:
            try:
                assert sample.request.allowed_tokens is not None
                self._loop.allow(sample.slot, sample.request.allowed_tokens(tuple(sample.answer)))
                self._samples.grammars[sample] = READY
            except Exception as error:
                self._samples.fail([sample], error)
        return [slot for slot, sample in self._samples.decoding.items() if self._samples.grammars.get(sample) != AWAY]

    # -- parts of prompts ----------------------------------------------------------------------------------------
    def _next_pass(self) -> tuple[PromptPass | None, list[tuple[Sample, int]]]:
        """The next parts of prompts, backed, and (sample, rows) of each; None and nothing where none is to be
        computed."""
        while parts := self._scheduler.chunks(self._budget_for(self._admission.held_back)):
            chunks = [
                Chunk(sample.slot, sample.version, sample.tokens(sample.computed, end), end)
                for sample, end in ((sample, sample.computed + count) for sample, count in parts)
            ]
            try:
                return self._passes.prepare(chunks), parts
            except OutOfPages as error:
                self._samples.preempt(error)
            except Exception as error:
                self._fail_parts(parts, error)
        return None, []

    def _budget_for(self, num_to_come: int) -> int:
        """Prompt tokens of the next pass. A large one costs every sequence that decodes a wait. Small ones cost every
        prompt that waits what they take longer, once for each prompt before it: the square of their number. Where
        several are more than two passes, two become one. A pass that an idle GPU waits for is small: while it runs, the
        pages of the next one are mapped.

        Args:
            num_to_come: prompts that could be given a slot, beside those that have one.
        """
        num_decoding = len(self._samples.decoding)
        if not num_decoding:
            return min(self._idle_budget, _FIRST * self._busy_budget) if self._passes.idle else self._idle_budget
        behind = self._scheduler.num_prefilling + num_to_come - 1
        pressing = max(1, _PRESSING * behind**2 / num_decoding)
        if behind and self._scheduler.num_prefilling_rows > _SEVERAL * self._busy_budget:
            pressing = max(_SEVERAL, pressing)
        budget = min(self._idle_budget, int(pressing * self._busy_budget) // _STEP * _STEP or self._busy_budget)
        return self._passes.room(budget, self._loop.rows_beside(min(num_decoding + 1, self._loop.max_batch)))

    def _enough(self, num_to_come: int) -> int:
        """Rows of prompts that fill the next pass."""
        return max(self._budget_for(num_to_come), _SEVERAL * self._busy_budget + 1)

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

    def _computed(self, parts: list[tuple[Sample, int]]) -> None:
        """These rows are there for whatever is launched from now on. Whose prompt that completes starts to decode."""
        for sample, count in parts:
            sample.computed += count
            self._meters.num_prefill_tokens += count
        complete = [sample for sample, _ in parts if sample.computed == sample.num_rows]
        complete += self._admission.wake([sample for sample, _ in parts if sample.computed < sample.num_rows])
        self._start([sample for sample in complete if sample.phase is Phase.PREFILLING])

    def _fail_parts(self, parts: list[tuple[Sample, int]], error: Exception) -> None:
        """Of a pass: those whose slots are lost, or all."""
        took_part = [sample for sample, _ in parts]
        lost = self._samples.lost(took_part)
        self._samples.fail(lost or took_part, error, gone=bool(lost))
