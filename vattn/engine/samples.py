"""The samples that wait and run: which slots they have, what is reported of them, and how they end."""

from __future__ import annotations

import time
from contextlib import suppress

from ..decode import DecodedToken, DecodeLoop
from ..errors import ConfigError, DriverError, OutOfPages, OutOfSlots
from ..requests import Request, StepToken
from .prefixes import Prefixes
from .scheduler import Phase, Sample, Scheduler
from .stats import Meters

__all__ = ["AWAY", "CHANGED", "KNOWN", "READY", "Samples"]

CHANGED = "its slot was released or truncated in the cache while the engine used it"

# Of a sample with ``allowed_tokens``: its newest token is known and the next mask is to be made; it may take part in
# the next step; it took part in one whose token is not known yet.
KNOWN, READY, AWAY = range(3)


class Samples:
    """The books of an engine's requests. For one thread; its caller puts signals off.

    Args:
        loop: decodes, in the slots of its cache.
        scheduler: says who is next.
        prefixes: what sequences can begin with.
        meters: count.

    Attributes:
        reported: tokens and ends that nobody has collected yet.
        decoding: by slot.
        grammars: those that decode with ``allowed_tokens``.
        now: when the step began; a sample waited until then for its slot.
        shortage: why nothing of ours runs.
    """

    def __init__(self, loop: DecodeLoop, scheduler: Scheduler, prefixes: Prefixes, meters: Meters) -> None:
        self._loop, self._cache, self._scheduler, self._meters = loop, loop.cache, scheduler, meters
        self._prefixes = prefixes
        self.reported: list[StepToken] = []
        self.decoding: dict[int, Sample] = {}
        self.grammars: dict[Sample, int] = {}
        self.now = 0.0
        self.shortage: OutOfPages | OutOfSlots | None = None
        self._samples: dict[int, list[Sample]] = {}  # of requests that go on

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
        """Every request; nothing of any is reported any more, and nothing stays stored."""
        self._prefixes.enabled = False
        for request_id in tuple(self._samples):
            self.cancel(request_id)
        self._prefixes.close()

    def collect(self) -> list[StepToken]:
        """What there is to report, which is handed out by that."""
        tokens, self.reported = self.reported, []
        return tokens

    def note(self, tokens: list[DecodedToken]) -> bool:
        """Report tokens; True if a sample ended."""
        ended: list[Sample] = []
        gaps: dict[float, int] = {}
        now = time.monotonic()  # the step may have taken long
        num_tokens = 0
        for token in tokens:
            sample = self.decoding.get(token.slot)
            if sample is None:
                continue
            if token.token is None:
                none = RuntimeError("no token could be chosen: each one was forbidden, or its logit was NaN")
                self.fail([sample], token.error or none)
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
                StepToken(
                    sample.request_id, sample.index, token.token, token.logprob, logprobs, reason, None, sample.cached
                )
            )
            if reason is not None:
                ended.append(sample)
            elif sample in self.grammars:
                self.grammars[sample] = KNOWN
        for last_s, times in gaps.items():
            self._meters.between_tokens_s.add(now - last_s, times)
        self._meters.note_tokens(num_tokens, now)
        for sample in ended:
            self._scheduler.note_length(sample)
            self._leave(sample)
        return bool(ended)

    # -- slots and memory ----------------------------------------------------------------------------------------
    def take_slot(self, sample: Sample, source: Sample | None) -> bool:
        """A slot for a sample: a fork of another's of the same request, or what there is. False: it waits again."""
        rows = sample.num_prompt_rows
        try:
            if source is not None and rows:
                slot, computed = self._cache.fork(source.slot, rows), rows
                self._prefixes.note(sample, slot)
            else:
                slot, computed = self._prefixes.begin(sample, self._scheduler.expected_rows(sample))
        except (OutOfPages, OutOfSlots) as error:
            self._scheduler.requeue(sample)
            self.shortage = error
            return False
        except Exception as error:
            self.fail([sample], error)
            return False
        if (former := self.decoding.get(slot)) is not None:  # its slot was released behind our back
            self._loop.cancel(slot)
            self.fail([former], ConfigError(CHANGED), gone=True)
        if sample.phase is Phase.FOLLOWING:
            self._scheduler.lead_no_more(sample)
        sample.slot, sample.computed = slot, computed
        sample.version = int(self._cache.versions([slot])[0])
        if not sample.was_admitted:
            sample.was_admitted = True
            sample.cached = computed
            self._meters.queue_s.add(self.now - sample.arrived_s)
        return True

    def preempt(self, error: OutOfPages) -> None:
        """Take a sample's memory back; its rows are computed again when they fit."""
        victim = self._scheduler.victim()
        if victim is not None:
            self.give_back(victim)
            self._scheduler.requeue(victim)
            self._meters.num_preemptions += 1
        if not self._scheduler.running:
            self.shortage = error

    def lost(self, samples: list[Sample]) -> list[Sample]:
        """Those whose slots somebody else has released or truncated behind our back: they are not ours any more."""
        with suppress(ConfigError):  # the cache is closed: that is everybody's fate
            versions = self._cache.versions([sample.slot for sample in samples]).tolist()
            return [sample for sample, version in zip(samples, versions, strict=True) if version != sample.version]
        return []

    def free_bytes(self) -> int:
        return self._cache.memory_limit - self._cache.stats().in_use_bytes

    def backed_rows(self, sample: Sample) -> int:
        with suppress(ConfigError):  # its slot was released behind our back, of which the next step tells
            return self._cache.seq_len(sample.slot) if sample.slot >= 0 else 0
        return sample.computed

    # -- ends ----------------------------------------------------------------------------------------------------
    def fail(self, samples: list[Sample], error: Exception, gone: bool = False) -> None:
        """They end with an error, and so do the samples of their requests that wait for their prompts."""
        for sample in samples:
            if sample.phase is not Phase.ENDED:
                followers = self._scheduler.followers(sample)
                followers = [each for each in followers if each.request_id == sample.request_id]
                if gone:
                    self.decodes_no_more(sample)
                    self._prefixes.forget(sample)
                    sample.slot = -1
                self.end(sample, "error", error)
                self.fail(followers, error)

    def end(self, sample: Sample, reason: str, error: Exception | None = None) -> None:
        self.reported.append(StepToken(sample.request_id, sample.index, None, finish_reason=reason, error=error))
        self._leave(sample, store=error is None)

    def _leave(self, sample: Sample, store: bool = True) -> None:
        """It waits and runs no more."""
        self.give_back(sample, store)
        self._scheduler.discard(sample)
        samples = self._samples[sample.request_id]
        samples.remove(sample)
        if not samples:
            del self._samples[sample.request_id]

    def give_back(self, sample: Sample, store: bool = True) -> None:
        """Its slot, if it has one. What was computed of it stays stored there, on request."""
        decodes = self.decodes_no_more(sample)
        slot = sample.slot
        if slot < 0:
            return
        self._prefixes.forget(sample)
        sample.slot = -1
        rows = (sample.num_rows if decodes else sample.computed) if store and self._prefixes.enabled else 0
        with suppress(ConfigError):  # the cache is closed, or the slot is somebody else's by now
            if decodes:
                try:
                    version = self._loop.release(slot, rows)
                except (OutOfPages, DriverError):  # of what lies past the end of its rows
                    self._cache.release(slot)
                    return
            elif self._cache.versions([slot])[0] == (version := sample.version):
                self._cache.store(slot, rows)
            else:
                return
            if rows:
                self._prefixes.store(sample, slot, version, rows)

    def decodes_no_more(self, sample: Sample) -> bool:
        """For the books of this; whether it did. Another one decodes in its slot where somebody has released that."""
        self.grammars.pop(sample, None)
        if decodes := self.decoding.get(sample.slot) is sample:
            del self.decoding[sample.slot]
        return decodes
