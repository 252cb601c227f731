"""``TransformersModel``: transformers' own forward as a model of the runtime, over a ``KVCache``."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from types import TracebackType
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from ..arguments import require_bool, shown
from ..attention import AttentionBackend, AttentionBatch, DecodeBatch
from ..errors import ConfigError
from ..kv_cache import KVCache
from ..layout import KVLayout
from ..ops.ops_table import Ops
from ..tuning import default_ops
from .capturable import FilledNumbers, FixedRopes, capturable_experts
from .examine import Plan, attention_layers, checked, implementations, learnt, positions, refusing, require_positions
from .fusion import Fusion, FusionReport
from .pass_attention import Recording, implementation_for, pass_layers
from .passes import IMPLEMENTATIONS, Pass, running
from .verify import own_logits, verify

__all__ = ["TransformersModel"]


class TransformersModel:
    """Any decoder of transformers as ``Engine`` and ``DecodeLoop`` run it: captured steps, prompts packed.

    The model's own forward computes; its attention reads the cache in place, through transformers'
    ``AttentionInterface``. Outside of the runtime's passes the model works as before, and after ``close`` nothing of
    vattn is left in it.

    Args:
        model: on one device, in evaluation mode. It is the caller's: it stays loaded after ``close``.
        max_seq_len: tokens of a sequence; None: the model's context.
        ops: the loop's own operations; None: fused on a GPU, else their references.
        fuse: compute the parts of its layers that vattn knows by fused operations, where they give the same numbers;
            their weights are merged in place. False: the model's own forward as it is, captured. None: where fused
            operations are kernels, as on a GPU; the references of a CPU are no faster than the model's own.

    Attributes:
        model: as given.
        config: of its text part.
        report: what was fused, what was left, and why; it can be printed.

    Raises:
        ConfigError: it is no decoder of attention layers alone, or something that vattn cannot run; says what to do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_seq_len: int | None = None,
        ops: Ops | None = None,
        *,
        fuse: bool | None = None,
    ) -> None:
        fuse = None if fuse is None else require_bool("fuse", fuse)
        if ops is not None and not isinstance(ops, Ops):
            raise ConfigError(f"ops must be operations, as vattn.tuning.default_ops(device, dtype), got {shown(ops)}")
        self.config = checked(model)
        self.model = model
        self._name = type(model).__name__
        self._device = model.device
        num_layers, configured = attention_layers(self._name, self.config)
        self._parameters = inspect.signature(model.forward).parameters
        require_positions(self._name, self._parameters)
        layers = pass_layers(num_layers, configured)
        self._cache = Cache(layers=list(layers))
        self._own_implementation, self._own_experts = implementations(model), model.get_experts_implementation()
        self.ops = default_ops(self._device, model.dtype) if ops is None else ops
        # transformers looks tokens up itself: what the loop brings along is one column of zeros.
        self.embedding = torch.zeros(1, 1, device=self._device).expand(self.config.vocab_size, 1)
        self._closed, self._attached, self._changes_experts, self._fills_numbers = False, True, False, False
        self._fusion: Fusion | None = None
        try:
            with torch.inference_mode():
                with refusing(self._name):
                    wanted = own_logits(model, self.config.vocab_size)
                self._ropes = FixedRopes(model)
                self.max_seq_len = positions(self.config, max_seq_len, configured, self._ropes.limit)
                self._changes_experts = capturable_experts(model)
                self._set_implementation()
                self._plan = self._record()
                for layer in self._plan.late:
                    layers[layer % len(layers)].is_late = True
            if self.ops.name == "fused" if fuse is None else fuse:
                self._fusion = Fusion(model, self.ops, self._forward, self.config.vocab_size, self.max_seq_len)
            with torch.inference_mode():
                verify(self, wanted)
        except BaseException:
            self.close()
            raise
        self.report = FusionReport({}, {}) if self._fusion is None else self._fusion.report

    # -- what the runtime asks -------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.model.dtype

    @property
    def num_heads(self) -> int:
        """Query heads, of the layer that has most."""
        return self._plan.num_heads

    @property
    def attention_features(self) -> frozenset[str]:
        """What attention needs beside windows, of SOFTCAP and SINKS."""
        return self._plan.features

    def kv_layout(self, max_seq_len: int | None = None) -> KVLayout:
        """The shape of its K and V, layers with the same heads and window in one group."""
        return self._plan.shapes.layout(self.max_seq_len if max_seq_len is None else max_seq_len, self._plan.dtype)

    def streamed_weights(self) -> tuple[int, int, int]:
        """(bytes, elements, elements of the output projection) of the weights that a step reads at least: of experts
        those of one token, of an embedding that is only looked up in nothing."""
        ends: tuple[Any, Any] = (self.model.get_output_embeddings(), self.model.get_input_embeddings())
        head, embedding = (end.weight for end in ends)
        share = getattr(self.config, "num_experts_per_tok", 1) / _num_experts(self.config)
        read = [
            (each.nbytes, each.numel(), share if ".experts." in name else 1)
            for name, each in self.model.named_parameters()
            if each is not embedding or each is head
        ]
        return round(sum(n * s for n, _, s in read)), round(sum(n * s for _, n, s in read)), head.numel()

    def require_fit(self, cache: KVCache) -> None:
        """Refuse a cache of another shape, and a model that cannot be run any more.

        Raises:
            ConfigError: says what differs.
        """
        self._require_usable()
        mine, its = _by_layer(self.kv_layout()), _by_layer(cache.layout)
        if mine != its or cache.layout.dtype != self._plan.dtype:
            raise ConfigError(
                f"the cache has {len(its)} layers of {cache.layout.dtype} with (KV heads, K and V head sizes, window) "
                f"{sorted(set(its.values()), key=str)}, the model {len(mine)} of {self._plan.dtype} with "
                f"{sorted(set(mine.values()), key=str)}; open the cache with model.kv_layout()"
            )
        now = next(self.model.parameters()).device
        if now != self._device:
            raise ConfigError(f"the model was moved from {self._device} to {now}: make a new TransformersModel")
        if self._fusion is not None:
            self._fusion.require_unchanged()
        if self._device != cache.device:
            raise ConfigError(f"the model is on {self._device}, the cache on {cache.device}")

    def decode(
        self, residual: torch.Tensor, batch: DecodeBatch, cache: KVCache, attention: AttentionBackend
    ) -> torch.Tensor:
        """Logits of one new token of each sequence; appends its K and V.

        Args:
            residual: not read; the tokens are the batch's.
            batch: slots, rows and tokens, on the device.
            cache: has rows ``[0, row]`` of every slot backed and writable.
            attention: reads them.

        Returns:
            ``[batch, vocab_size]``.
        """
        return self._forward(_tokens(batch), Pass(cache, batch.slots_int32, batch.rows_int32, [(batch, attention)]))

    def prefill(self, tokens: torch.Tensor, batch: AttentionBatch, cache: KVCache, attention: AttentionBackend) -> None:
        """Compute the new tokens of a batch and append their K and V.

        Args:
            tokens: ``[T]`` int64, the new tokens of all sequences, packed in the batch's order.
            batch: slots and lengths.
            cache: has rows ``[0, seq_len)`` of every sequence backed and writable, all but the new ones computed.
            attention: reads them.

        Raises:
            ConfigError: another number of tokens than the batch has, rows of padding, or a row beyond ``max_seq_len``.
        """
        self._check_prefill(tokens, batch)
        this = Pass(cache, batch.token_slots, batch.token_positions, [(batch, attention)])
        self._forward(tokens, this, num_logits=0)

    def prefill_and_decode(
        self,
        tokens: torch.Tensor,
        prefill: AttentionBatch,
        prefill_attention: AttentionBackend,
        residual: torch.Tensor,
        decode: DecodeBatch,
        decode_attention: AttentionBackend,
        cache: KVCache,
    ) -> torch.Tensor:
        """``prefill`` and ``decode`` in one pass, which reads the weights once.

        Args:
            tokens, prefill, prefill_attention: as for ``prefill``.
            residual, decode, decode_attention: as for ``decode``; of other slots.
            cache: as for both.

        Returns:
            ``[batch, vocab_size]``, the logits of ``decode``.

        Raises:
            ConfigError: as for ``prefill``.
        """
        self._check_prefill(tokens, prefill)
        this = Pass(
            cache,
            torch.cat((prefill.token_slots, decode.slots_int32)),
            torch.cat((prefill.token_positions, decode.rows_int32)),
            [(prefill, prefill_attention), (decode, decode_attention)],
        )
        return self._forward(torch.cat((tokens, _tokens(decode))), this, num_logits=decode.batch_size)

    def close(self) -> None:
        """Give the model its own attention back. Does nothing the second time."""
        if not self._closed:
            self.detach()
            self._closed = True
            if self._fusion is not None:
                self._fusion.undo()

    def detach(self) -> None:
        """Give the model its own attention back until ``attach``. Passes are refused meanwhile; replays of captured
        steps are none, and go on. Does nothing the second time."""
        if self._attached:
            self._attached = False
            self.model.set_attn_implementation(self._own_implementation)
            if self._changes_experts:
                self.model.set_experts_implementation(self._own_experts)

    def attach(self) -> None:
        """Put vattn's attention in the place of what the model's is by now. Does nothing the second time."""
        if not self._attached:
            self._own_implementation = implementations(self.model)
            self._own_experts = self.model.get_experts_implementation()
            self._attached = True
            self._changes_experts = capturable_experts(self.model)
            self._set_implementation()

    def __enter__(self) -> TransformersModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- a pass ----------------------------------------------------------------------------------------------------
    def _forward(self, tokens: torch.Tensor, this: Pass, num_logits: int | None = None) -> torch.Tensor:
        """Logits ``[num_logits, vocab_size]`` of the last tokens; None: of all ``[T]``."""
        self._require_usable()
        options: dict[str, Any] = {}
        keep = "logits_to_keep" if "logits_to_keep" in self._parameters else None
        if keep and num_logits is not None:
            options[keep] = torch.arange(len(tokens) - num_logits, len(tokens), device=tokens.device)
        with running(this), self._ropes.applied(), FilledNumbers() if self._fills_numbers else nullcontext():
            out = self.model(
                input_ids=tokens.unsqueeze(0),
                position_ids=this.where[1].unsqueeze(0),
                use_cache=True,
                **{self._cache_name: self._cache},
                **options,
            )
        logits: torch.Tensor = out.logits[0]
        return logits if num_logits is None or keep else logits[len(tokens) - num_logits :]

    @property
    def _cache_name(self) -> str:
        return "cache" if "cache" in self._parameters else "past_key_values"

    def _require_usable(self) -> None:
        if self._closed:
            raise ConfigError("this TransformersModel is closed: make a new one")
        if not self._attached:
            raise ConfigError("this TransformersModel is detached: attach() it")
        if self.config._attn_implementation not in IMPLEMENTATIONS:
            raise ConfigError(
                "the model's attention was set to another implementation while a TransformersModel runs it: close that "
                "first, and make a new one"
            )
        if self.model.training:
            raise ConfigError("the model is in training mode: call model.eval()")

    def _check_prefill(self, tokens: torch.Tensor, batch: AttentionBatch) -> None:
        if batch.starts is not None:
            raise ConfigError("this model takes packed tokens: a batch without starts, that is without padding")
        if tokens.shape != (batch.num_tokens,):
            raise ConfigError(f"the batch has {batch.num_tokens} new tokens, got a tensor of shape {[*tokens.shape]}")
        if batch.max_end > self.max_seq_len:
            raise ConfigError(f"row {batch.max_end - 1} is beyond the model's context of {self.max_seq_len} tokens")

    # -- before the first pass -------------------------------------------------------------------------------------
    def _set_implementation(self) -> None:
        """Give the text part vattn's attention."""
        key = next((key for key in self.model.config.sub_configs if getattr(self.model.config, key) is self.config), "")
        mine = implementation_for(self.config._attn_implementation)
        self.model.set_attn_implementation({**self._own_implementation, key: mine})
        if self.config._attn_implementation != mine:
            raise ConfigError(
                f"{self._name} computes attention by itself, not through transformers' AttentionInterface: use "
                "vattn.hf.VirtualCache with its generate()"
            )

    def _record(self) -> Plan:
        """Find what the layers cache and what attention needs, in a pass that computes none."""
        rows = torch.arange(4, device=self._device)
        recording = Recording(rows)
        with refusing(self._name), FilledNumbers() as numbers:
            logits = self._forward((rows + 1) % self.config.vocab_size, recording, num_logits=1)
        self._fills_numbers = numbers.count > 0
        return learnt(self._name, self.config, recording, logits)


def _tokens(batch: DecodeBatch) -> torch.Tensor:
    if batch.tokens_int32 is None:
        raise ConfigError("a transformers model looks tokens up itself: give the DecodeBatch its tokens")
    return batch.tokens_int32.long()


def _by_layer(layout: KVLayout) -> dict[int, tuple[int, int, int, int | None]]:
    return {
        layer: (group.num_kv_heads, group.head_dim, group.v_head_dim or group.head_dim, group.window)
        for group in layout.groups
        for layer in group.layers
    }


def _num_experts(config: PreTrainedConfig) -> int:
    """1 where there are none."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((found for name in names if isinstance(found := getattr(config, name, None), int)), 1)
