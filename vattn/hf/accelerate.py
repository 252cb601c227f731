"""``accelerate``: inside, a model's own ``generate`` decodes by captured steps.

transformers' loop runs as always, with its logits processors, stopping criteria, streamers, sampling and beams. It gets
a ``GenerationCache``, and every call of the model with that cache is answered here: padding is dropped, a prompt is
computed in packed passes, and a token of each sequence by a captured step. Any other call is the model's own.

Only the model that was given changes, by two attributes of the object, ``forward`` and ``generate``.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable
from functools import partial
from types import MethodType, TracebackType
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ..arguments import optional_int, require_bool, require_int
from ..decode.graphs import GraphReport
from ..errors import ConfigError
from ..kv_cache import KVCache
from .current_steps import CurrentSteps
from .examine import described, require_memory
from .examine_generation import call_reason, model_reason, padding_of, result_class
from .generation_cache import GenerationCache
from .model import TransformersModel
from .shadow import Shadow

__all__ = ["Accelerated", "accelerate"]

_SHADOWED = ("forward", "generate")
_CACHES = ("cache", "past_key_values")  # what versions of transformers call the argument


def accelerate(
    model: PreTrainedModel,
    max_length: int | None = None,
    *,
    max_batch: int = 8,
    memory_limit: int | None = None,
    run_ahead: bool | None = None,
    fuse: bool | None = None,
) -> Accelerated:
    """Make ``model.generate(...)`` decode by captured steps, from now until ``restore`` or the end of a ``with`` block.

    Calls that captured steps cannot serve are computed as without it. A warning says why, once for each reason.

    Args:
        model: a decoder of transformers, in evaluation mode.
        max_length: the most tokens a sequence can have, new ones included; None: the model's context. It costs
            addresses, not memory. What is longer goes on in the model's own forward.
        max_batch: rows of a batch, beams included, to open for. A larger batch opens for twice as many, once.
        memory_limit: bytes for K and V, at least the pages of one token; None: 90 % of what is free at the first
            ``generate``.
        run_ahead: whether a step may be launched before transformers has chosen its tokens, with the likeliest ones;
            None: on a GPU. What ``generate`` returns does not depend on it.
        fuse: as for ``TransformersModel``; False: the model's own forward is captured as it is.

    Raises:
        ConfigError: an argument is wrong, there is no memory for so many rows, or this model is accelerated already.
    """
    return Accelerated(model, max_length, max_batch, memory_limit, run_ahead, fuse)


class Accelerated:
    """What ``accelerate`` returns: a context manager.

    ``generate`` calls of several threads take turns.

    Attributes:
        model: as given.
        reasons: why calls were not served by captured steps, each once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_length: int | None,
        max_batch: int,
        memory_limit: int | None,
        run_ahead: bool | None,
        fuse: bool | None,
    ) -> None:
        if not isinstance(model, PreTrainedModel) or not hasattr(model, "generate"):
            raise ConfigError(f"accelerate takes a model of transformers that generates, got {described(model)}")
        if getattr(model.config, "is_encoder_decoder", False):
            raise ConfigError(f"{type(model).__name__} is an encoder-decoder, accelerate takes decoders")
        if any(isinstance(each := vars(model).get(name), Shadow) and each.on for name in _SHADOWED):
            raise ConfigError(f"this {type(model).__name__} is accelerated already: restore() that first")
        max_batch = require_int("max_batch", max_batch, 1)
        memory_limit = optional_int("memory_limit", memory_limit, 1)
        require_memory(model, max_batch, memory_limit)
        self._current = CurrentSteps(
            model,
            optional_int("max_length", max_length, 1),
            max_batch,
            memory_limit,
            None if run_ahead is None else require_bool("run_ahead", run_ahead),
            None if fuse is None else require_bool("fuse", fuse),
        )
        self.model = model
        self.reasons: list[str] = []
        self._lock = threading.RLock()
        self._generating = False
        self._trusted = False  # whether this call of generate has shown its padding and positions
        self._result = result_class(type(model))
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = next((name for name in _CACHES if name in parameters), None)
        self._keeps_all_logits = "logits_to_keep" not in parameters
        self._own = {name: vars(model)[name] for name in _SHADOWED if name in vars(model)}
        self._generate: Callable[..., Any] = getattr(model, "generate")  # noqa: B009
        self._shadows = {
            "forward": Shadow(self._forward, self._on_forward),
            "generate": Shadow(self._generate, self._on_generate),
        }
        for name, shadow in self._shadows.items():
            setattr(model, name, shadow)

    # -- what a user sees ----------------------------------------------------------------------------------------
    def restore(self) -> None:
        """Leave the model as it was found, and free what this holds. Idempotent."""
        with self._lock:
            for name, shadow in self._shadows.items():
                shadow.on = False  # somebody may have kept it, or put something around it
                if vars(self.model).get(name) is shadow:
                    delattr(self.model, name)
                    if name in self._own:
                        setattr(self.model, name, self._own[name])
            self._current.close()

    @property
    def kv_cache(self) -> KVCache | None:
        """Where K and V are; None before the first ``generate``."""
        return None if (steps := self._current.steps) is None else steps.cache

    @property
    def graphs(self) -> tuple[GraphReport, ...]:
        """What was captured so far, by batch size."""
        return () if (steps := self._current.steps) is None else steps.graphs

    @property
    def transformers_model(self) -> TransformersModel | None:
        """The model as the runtime runs it; None before the first ``generate``."""
        return self._current.hf

    @property
    def num_ahead(self) -> tuple[int, int]:
        """Steps that were launched before their tokens were known, with the right ones and with wrong ones."""
        steps = self._current.steps
        return (0, 0) if steps is None else (steps.guesses.num_hits, steps.guesses.num_misses)

    def __repr__(self) -> str:
        if not self._shadows["generate"].on:
            state = "restored"
        elif (reason := self._against() or self._current.reason) is not None:
            state = f"the model's own forward, because {reason}"
        elif self._current.steps is None:
            state = "nothing generated yet"
        elif self.model.device.type != "cuda":
            state = "steps that run eagerly, as CUDA graphs need a GPU"
        else:
            batches = ", ".join(str(report.batch) for report in self.graphs)
            state = f"captured steps, of batches of {batches}" if batches else "captured steps, none so far"
        return f"<Accelerated {type(self.model).__name__} on {self.model.device}: {state}>"

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    # -- generate ------------------------------------------------------------------------------------------------
    def _on_generate(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(self._generate).bind_partial(*args, **kwargs).arguments
        call.update(call.pop("kwargs", {}))
        given = next((call[name] for name in _CACHES if call.get(name) is not None), None)
        config = self._config(call)
        if config is None:  # transformers says what is wrong with it
            return self._generate(*args, **kwargs)
        ours = isinstance(given, GenerationCache) and given.steps is self._current.steps is not None
        reason = call_reason(config, call, None if ours else given)
        if self._cache_name is None:
            reason = f"{type(self.model).__name__} takes no cache of K and V"
        with self._lock:
            if self._generating:
                reason = "generate() was called inside of generate()"
            reason = reason or self._ready()
            if reason is None:
                return self._run(given, config, args, kwargs)
        self._say(reason)
        return self._generate(*args, **kwargs)

    def _run(self, given: GenerationCache | None, config: GenerationConfig, args: Any, kwargs: Any) -> Any:
        steps = self._current.opened()
        assert self._cache_name is not None
        cache = GenerationCache(steps) if given is None else given
        greedy = config.num_beams in (None, 1) and not config.do_sample
        ends, padding = _tokens(config.eos_token_id), _tokens(config.pad_token_id)
        steps.guesses.expect(greedy, ends, next(iter(padding or ends), None))
        self._generating, self._trusted = True, False
        result = None
        try:
            self._current.attach()
            if given is None:
                kwargs = {name: value for name, value in kwargs.items() if name not in _CACHES}
                kwargs[self._cache_name] = cache
            result = self._generate(*args, **kwargs)
            return result
        finally:
            self._generating = self._trusted = False
            self._current.detach()
            if given is None and getattr(result, self._cache_name, None) is not cache:
                cache.give_up()

    def _config(self, call: dict[str, Any]) -> GenerationConfig | None:
        """The call's, the model's and transformers' options together; None where they are wrong."""
        try:
            config = call.get("generation_config")
            config = GenerationConfig() if config is None else copy.deepcopy(config)
            config.update(**self.model.generation_config.to_dict(), defaults_only=True, allow_custom_entries=True)
            config.update(**{name: value for name, value in call.items() if name != "generation_config"})
            return config
        except Exception:
            return None

    # -- forward -------------------------------------------------------------------------------------------------
    @property
    def _forward(self) -> Callable[..., Any]:
        """The model's own, of the class that it has by now."""
        return self._own.get("forward") or MethodType(type(self.model).forward, self.model)

    @partial(torch.compiler.disable, recursive=False)  # the model's own may be compiled
    def _on_forward(self, *args: Any, **kwargs: Any) -> Any:
        result, call = self._served(args, kwargs)
        return self._forward(**call) if result is None else result

    @torch.compiler.disable
    def _served(self, args: tuple[Any, ...], call: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """What captured steps return, or None and the arguments that the model's own forward gets instead."""
        if args:
            call = {**inspect.signature(self._forward).bind_partial(*args).arguments, **call}
        cache = call.get(self._cache_name or "")
        if not isinstance(cache, GenerationCache):
            return None, call
        assert self._cache_name is not None
        with self._lock:
            cache.require_steps()
            # Within generate the model is as it was when that began.
            answer: torch.Tensor | str | None = None if self._generating else self._ready()
            cache.require_steps()  # gone where the model has changed
            try:
                if answer is None:
                    self._current.attach()
                    answer = self._answer(cache, call)
            finally:
                if not self._generating:
                    self._current.detach()
            if isinstance(answer, torch.Tensor):
                result = self._result(logits=answer[:, None], **{self._cache_name: cache})
                return (result.to_tuple() if call.get("return_dict") is False else result), call
            self._say(answer)
            self._current.detach()
            # transformers goes on with the cache that a model returns.
            return None, {**call, self._cache_name: cache.dynamic(self.model.config.get_text_config(decoder=True))}

    def _answer(self, cache: GenerationCache, call: dict[str, Any]) -> torch.Tensor | str:
        """The logits ``[batch, vocab_size]`` behind the last tokens, or why captured steps cannot compute them."""
        tokens = call.get("input_ids")
        if cache.num_columns and tokens is not None and tokens.shape[-1] == 1 and self._trusted:
            padding: list[int] | str = cache.padding
        else:
            keep = 1 if self._keeps_all_logits and self._generating else 0  # generate looks at the last ones alone
            padding = padding_of({"logits_to_keep": keep, **call}, cache.num_columns, cache.padding)
        if isinstance(padding, str):
            return padding
        assert isinstance(tokens, torch.Tensor)
        batch, new = tokens.shape
        steps = cache.require_steps()
        if cache.num_columns + new - min(padding) > steps.max_seq_len:
            return f"a sequence is longer than max_length={steps.max_seq_len}"
        if cache.slots and batch != len(cache.slots):
            raise ConfigError(f"this cache holds a batch of {len(cache.slots)}, got a batch of {batch}")
        if batch > steps.max_batch:
            if cache.slots:
                return f"the batch has become larger than max_batch={steps.max_batch}"
            reason = self._current.grow(batch)
            cache.use(self._current.opened())
            if reason is not None:
                return reason
        self._trusted = self._generating
        if cache.slots:
            return cache.append(tokens)
        return cache.begin([row[n:] for row, n in zip(tokens.tolist(), padding, strict=True)], padding)

    # -- what is against it --------------------------------------------------------------------------------------
    def _ready(self) -> str | None:
        """Have steps of the model as it is now, or say why there are none."""
        return self._against() or self._current.ready()

    def _against(self) -> str | None:
        """What is against captured steps in the model at a glance."""
        # What is around it would be computed twice, by a pass and by what calls the model.
        if vars(self.model).get("forward") is not self._shadows["forward"]:
            return "the model's forward was replaced inside of accelerate()"
        return model_reason(self.model)

    def _say(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)
            warnings.warn(f"accelerate: the model's own forward decodes here, because {reason}", stacklevel=5)


def _tokens(ids: Any) -> list[int]:
    """Token ids of a generation config, which has one, several or none."""
    if ids is None:
        return []
    return torch.as_tensor(ids).flatten().tolist()
