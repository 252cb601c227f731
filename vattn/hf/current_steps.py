"""Captured steps of a model as it is now: they are made anew once it has changed."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..errors import ConfigError, OutOfPages
from .captured_steps import CapturedSteps
from .examine_generation import fingerprint, kept_tensors
from .model import TransformersModel

__all__ = ["CurrentSteps"]


class CurrentSteps:
    """The arguments are those of ``accelerate``, checked.

    Attributes:
        hf: the model as the runtime runs it; None before ``ready``, and where it cannot be run.
        steps: opened for it; None likewise.
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
        self._model, self._max_length, self._max_batch = model, max_length, max_batch
        self._memory_limit, self._run_ahead, self._fuse = memory_limit, run_ahead, fuse
        self.hf: TransformersModel | None = None
        self.steps: CapturedSteps | None = None
        self._known: tuple[Any, str | None] | None = None  # a state of the model, and what is against it
        self._kept: set[tuple[int, str]] = set()  # tensors that the model's forward leaves on its modules

    @property
    def reason(self) -> str | None:
        """Why there were no steps of the model when ``ready`` last looked; None where there were."""
        return None if self._known is None else self._known[1]

    def ready(self) -> str | None:
        """Have steps of the model as it is now, or say why there are none."""
        if self._known is None or self._known[0] != fingerprint(self._model, self._kept):
            self.close()
            reason = None
            before = kept_tensors(self._model)
            try:
                self.hf = self._run_by_passes()
                self.opened()
                self.detach()
            except ConfigError as error:
                self.close()
                reason = str(error)
            self._kept = {key for key, where in kept_tensors(self._model).items() if before.get(key) != where}
            self._known = fingerprint(self._model, self._kept), reason
        return self._known[1]

    def attach(self) -> None:
        """While the model runs passes; else it has its own attention, whoever asks."""
        if self.hf is not None:
            self.hf.attach()

    def detach(self) -> None:
        """The end of that."""
        if self.hf is not None:
            self.hf.detach()

    def opened(self) -> CapturedSteps:
        """The steps, opened where they are not."""
        if self.steps is None:
            assert self.hf is not None
            on_gpu = self.hf.device.type == "cuda"
            run_ahead = on_gpu if self._run_ahead is None else self._run_ahead
            self.steps = CapturedSteps(self.hf, self._max_batch, self._memory_limit, run_ahead)
        return self.steps

    def grow(self, batch: int) -> str | None:
        """Open for a larger batch; sequences of earlier calls are lost. Returns why that cannot be: it is as large as
        before then."""
        before = self._max_batch
        self._close_steps()
        while self._max_batch < batch:
            self._max_batch *= 2
        try:
            self.opened()
        except (ConfigError, OutOfPages) as error:
            self._max_batch = before
            return f"there is no room for a batch of {batch}: {error}"
        return None

    def close(self) -> None:
        """Free everything; ``ready`` makes it anew."""
        self._known = None
        self._close_steps()
        hf, self.hf = self.hf, None
        if hf is not None:
            hf.close()

    def _close_steps(self) -> None:
        steps, self.steps = self.steps, None
        if steps is not None:
            steps.close()

    def _run_by_passes(self) -> TransformersModel:
        """For texts of ``max_length``, or as long as the model allows where that is shorter."""
        text = self._model.config.get_text_config(decoder=True)
        if getattr(text, "max_position_embeddings", None) is None:
            return TransformersModel(self._model, self._max_length, fuse=self._fuse)
        hf = TransformersModel(self._model, fuse=self._fuse)
        hf.max_seq_len = min(hf.max_seq_len, self._max_length or hf.max_seq_len)
        return hf
