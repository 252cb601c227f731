"""Random loads in which the model, the callbacks and the memory fail anywhere: only those end whose fault it was."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.engine import Fate, Faulty, alone, any_request, cache_of, tokens_of

from vattn import Engine, StepToken
from vattn.errors import DriverError, OutOfPages
from vattn.models import Llama

ERRORS: dict[str, Callable[[], BaseException]] = {
    "error": lambda: RuntimeError("INJECTED"),
    "driver": lambda: DriverError("launch", "INJECTED"),
    "interrupt": lambda: KeyboardInterrupt("INJECTED"),
    "pages": lambda: OutOfPages("INJECTED"),
}


class Chance:
    """Raises now and then, as long as it is on."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.rate, self.is_on, self.num_raised = rng, rng.choice((0.01, 0.03, 0.1)), True, 0

    def take(self, *kinds: str) -> None:
        if self.is_on and self.rng.random() < self.rate:
            self.num_raised += 1
            raise ERRORS[self.rng.choice(kinds)]()


@pytest.mark.parametrize("fixed_sizes", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_random_faults(model: Llama, seed: int, fixed_sizes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is what the request gives alone, whatever was raised; nothing is lost, and nobody waits for ever."""
    rng = random.Random(seed)
    chance = Chance(rng)
    kinds = [any_request(rng) for _ in range(12)]
    expected = alone(model, kinds)
    faulty = Faulty(model)
    faulty.on_prefill = lambda packed: chance.take("error", "driver", "interrupt")
    faulty.on_decode = lambda: chance.take("error", "driver", "interrupt")

    def allowed(answer: Any) -> Any:
        chance.take("error", "interrupt")
        return rng.choice((None, np.ones(128, bool)))

    with cache_of(model, max_slots=rng.choice((3, 4, 7)), num_pages=12 + rng.randrange(12)) as cache:
        ensure_batch = cache.ensure_batch

        def ensure(*slots: Any, **options: Any) -> None:
            chance.take("pages")
            ensure_batch(*slots, **options)

        with Engine(faulty, cache, max_step_tokens=rng.choice((1, 7, 17, 256))) as engine:
            if fixed_sizes:  # as on a GPU
                cache.ensure(engine._loop.own_slot, 1)
                engine._passes._captures = True
            monkeypatch.setattr(cache, "ensure_batch", ensure)
            fates: dict[tuple[int, int], Fate] = {}
            num_submitted = num_steps = 0
            while num_submitted < 40 or engine.has_work:
                num_steps += 1
                assert num_steps < 5000
                while num_submitted < 40 and engine.num_waiting < 10 and rng.random() < 0.5:
                    kind = rng.randrange(len(kinds))
                    options: dict[str, Any] = {"priority": rng.choice((0, 0, 1, -3))}
                    if rng.random() < 0.4:
                        options["allowed_tokens"] = allowed
                    request_id = engine.submit(replace(kinds[kind], **options))
                    fates.update(((request_id, each.index), Fate(each)) for each in expected[kind])
                    num_submitted += 1
                if fates and rng.random() < 0.02:
                    request_id = rng.choice(sorted(fates))[0]
                    engine.cancel(request_id)
                    fates = {key: fate for key, fate in fates.items() if key[0] != request_id}
                try:
                    tokens = engine.step()
                except (KeyboardInterrupt, OutOfPages):
                    continue
                for new in tokens:
                    note(fates[new.request_id, new.index], new)
                if rng.random() < 0.1:
                    cache.check_integrity()
            assert all(fate.finish_reason for fate in fates.values())
            assert chance.num_raised
            chance.is_on = False
            assert not engine._loop.slots
            assert tokens_of(engine.generate(kinds[:1])) == tokens_of(expected[0])
        assert cache.stats().num_live_slots == cache.stats().in_use_bytes == 0
        cache.check_integrity()


def note(fate: Fate, new: StepToken) -> None:
    if new.finish_reason == "error":
        assert "INJECTED" in str(new.error)
        assert fate.finish_reason is None
        fate.finish_reason = "error"
    else:
        fate.add(new)
