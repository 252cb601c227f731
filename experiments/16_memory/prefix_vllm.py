"""vLLM's side, with its prefix cache, in a process of its own: ``python prefix_vllm.py OUTPUT``, vLLM on the path."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import prefix  # puts 13_serving on the path
from vllm_side import CONFIG, Vllm


class Salted(Vllm):
    salt: str | None = None

    def with_salt(self, salt: str | None) -> Salted:
        self.salt = salt
        return self

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        self._next += 1
        sampling = self._sampling(
            temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False, output_kind=self._delta
        )
        asked = {"prompt_token_ids": list(prompt), **({} if self.salt is None else {"cache_salt": self.salt})}
        self._engine.add_request(str(self._next), asked, sampling)
        return self._next


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    import torch
    import vllm

    case = prefix.CASES["8B"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=2 * case.max_seq_len,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )
        found = dict(prefix.measure(Salted(llm), case, sys.argv[2:]))
        about = f"vLLM {vllm.__version__}, torch {torch.__version__}"
        Path(sys.argv[1]).write_text(json.dumps({"about": about, "found": found}))


if __name__ == "__main__":  # vLLM's own processes import this module
    main()
