"""Tensor parallelism of transformers: two processes, each with its own heads in its own cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import CACHE, make_model, prompt  # noqa: E402

RANK = """
import sys
import torch
from transformers import AutoModelForCausalLM
from vattn.hf import VirtualCache

folder, tokens, name = sys.argv[1:]
torch.distributed.init_process_group("gloo")
tokens = torch.load(tokens)
model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32).eval()
model.generation_config.eos_token_id = None
with VirtualCache(model.config, max_length=96, page_bytes=4096) as past:
    out = model.generate(tokens, **{name: past}, max_new_tokens=40, do_sample=False)
    heads = past.layers[0].keys.shape[1]
    past.kv_cache.check_integrity()
rank = torch.distributed.get_rank()
torch.save((heads, out), f"{folder}/out{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_each_rank_holds_its_own_heads(tmp_path: Path):
    model = make_model("Llama")
    model.resize_token_embeddings(98)  # transformers 5.17 wants an even number for two ranks
    wanted = model.generate(prompt(2), max_new_tokens=40, do_sample=False)
    model.save_pretrained(tmp_path)
    torch.save(prompt(2), tmp_path / "tokens.pt")
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    result = subprocess.run(
        [*command, "--standalone", str(tmp_path / "rank.py"), str(tmp_path), str(tmp_path / "tokens.pt"), CACHE],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        heads, out = torch.load(tmp_path / f"out{rank}.pt")
        assert heads == 1  # of two
        assert torch.equal(out, wanted)
