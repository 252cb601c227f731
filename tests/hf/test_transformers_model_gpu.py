"""``TransformersModel`` on a GPU, where steps are captured: the tokens of ``generate`` on the same GPU in float32."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import make_model, prompt  # noqa: E402

from vattn import ConfigError, Engine, Request  # noqa: E402
from vattn.hf import TransformersModel  # noqa: E402

pytestmark = pytest.mark.gpu
TEXTS = [prompt(1, seed=seed, length=length)[0].tolist() for seed, length in enumerate((11, 3, 30, 1))]
CASES = {
    **{
        name: {}
        for name in (
            *("Llama", "Mistral, window 16", "Qwen3", "Qwen3-MoE", "Gemma 2", "Gemma 3", "Gemma 4, shared K and V"),
            *("GPT-OSS", "GPT-2", "OPT", "DiffLlama", "DeepSeek-V3", "Phi-3, longrope", "Llama, dynamic NTK"),
            *("GraniteMoe", "Glm4Moe"),
        )
    },
    "Llama 4, chunks": {"attention_chunk_size": 64},
    # Makes a tensor of a number in every pass.
    "Gemma 3n, shared K and V": {"activation_sparsity_pattern": [0.5, 0.0] * 2},
}


@pytest.mark.parametrize("name", CASES)
def test_captured_steps(name):
    model = make_model(name, **CASES[name]).cuda()
    experts = model.get_experts_implementation()
    wanted = [
        model.generate(torch.tensor([text], device="cuda"), max_new_tokens=24, do_sample=False)[0, len(text) :].tolist()
        for text in TEXTS
    ]
    with TransformersModel(model) as ours, Engine(ours, max_batch=4, max_step_tokens=8) as engine:
        assert all(report.captured for report in engine._loop.graphs)
        for _ in range(2):
            completions = engine.generate([Request(text, max_new_tokens=24) for text in TEXTS])
            assert [list(completion.tokens) for completion in completions] == wanted
    assert model.get_experts_implementation() == experts


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "GPT-OSS", "Gemma 2"])
def test_bfloat16(name):
    """Most first tokens are the model's own."""
    model = make_model(name).to("cuda", torch.bfloat16)
    with Engine(model, max_batch=4) as engine:
        found = engine.generate([Request(text, max_new_tokens=8) for text in TEXTS])
    same = 0
    for text, completion in zip(TEXTS, found, strict=True):
        own = model.generate(torch.tensor([text], device="cuda"), max_new_tokens=8, do_sample=False)[0, len(text) :]
        same += own.tolist()[0] == completion.tokens[0]
    assert same >= 3


def test_a_layer_that_brings_a_tensor_from_the_host_is_refused():
    model = make_model("Llama").cuda()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + torch.tensor([0.0] * x.shape[-1], device=x.device)
    with pytest.raises(ConfigError, match="a CUDA graph cannot capture LlamaForCausalLM"):
        TransformersModel(model)


def test_a_layer_that_waits_for_the_gpu_is_refused():
    model = make_model("Llama").cuda()
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) + 0 * x.sum().item()
    with pytest.raises(ConfigError, match="a CUDA graph cannot capture LlamaForCausalLM"):
        TransformersModel(model)
    del mlp.forward
    assert torch.rand(3, device="cuda").isfinite().all()  # random numbers are as before the capture that failed
    with TransformersModel(model) as ours, Engine(ours, max_batch=1) as engine:
        assert engine.generate([Request(TEXTS[0], max_new_tokens=2)])[0].tokens
