"""vLLM's side, in a process of its own: ``python vllm_side.py OUTPUT``, with vLLM on the path."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import workload

# Llama-3.1-8B's shape. vLLM draws the weights ("dummy").
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


class Vllm:
    """Its offline engine, with its own process for the scheduler and the model, which is its default."""

    def __init__(self, llm: Any) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._engine, self._next = llm.llm_engine, 0
        self._sampling, self._delta = SamplingParams, RequestOutputKind.DELTA

    def submit(self, prompt: Sequence[int], max_new_tokens: int) -> int:
        self._next += 1
        sampling = self._sampling(
            temperature=0.0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False, output_kind=self._delta
        )
        self._engine.add_request(str(self._next), {"prompt_token_ids": list(prompt)}, sampling)
        return self._next

    def step(self) -> list[tuple[int, int]]:
        came = [(int(each.request_id), len(each.outputs[0].token_ids)) for each in self._engine.step()]
        return [(request, count) for request, count in came if count]

    def cancel(self, request: int) -> None:
        self._engine.abort_request([str(request)])


def main() -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    os.environ |= {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    import torch
    import vllm

    case = workload.CASES["8B"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        begin = time.perf_counter()
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=case.max_seq_len,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=False,
            disable_log_stats=True,
            seed=0,
        )
        system = Vllm(llm)
        workload.run(system, [(workload.tokens(case, 128, 1), 1)])
        opened = time.perf_counter() - begin
        config = llm.llm_engine.vllm_config.scheduler_config
        found = {f"{case.name} opening": {"open_to_first_token": [opened]}, **dict(workload.measure(system, case))}
        about = f"vLLM {vllm.__version__}, torch {torch.__version__}, {config.max_num_batched_tokens} tokens a step"
        Path(sys.argv[1]).write_text(json.dumps({"about": about, "found": found}))


if __name__ == "__main__":  # vLLM's own processes import this module
    main()
