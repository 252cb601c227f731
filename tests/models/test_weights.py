"""Weights and configs from files: round trips, transformers' own loader as the judge, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.llama import SHAPES, hf_llama, open_cache, random_tokens, run, save_folder

from vattn.errors import ConfigError
from vattn.models import load
from vattn.models.config import LlamaConfig
from vattn.models.gguf import hf_name, unpermute
from vattn.models.loader import find, load_model, load_tokenizer

pytest.importorskip("transformers")


def assert_same_logits(hf_model: Any, folder: Path) -> None:
    tokens = random_tokens(40, hf_model.config.vocab_size)
    with torch.no_grad():
        expected = hf_model(torch.tensor([tokens])).logits[0]
    model = load_model(find(folder))
    with open_cache(model) as cache:
        got = run(model, cache, [cache.acquire()], [tokens], all_logits=True)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)


# Safetensors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", list(SHAPES))
def test_safetensors_folder(tmp_path: Path, shape: str) -> None:
    hf_model = hf_llama(**SHAPES[shape])
    hf_model.save_pretrained(tmp_path)
    assert_same_logits(hf_model, tmp_path)


def test_sharded_folder(tmp_path: Path) -> None:
    hf_model = hf_llama()
    hf_model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert_same_logits(hf_model, tmp_path)
    shards[1].unlink()
    with pytest.raises(ConfigError, match=shards[1].name):
        load_model(find(tmp_path))


def test_config_as_transformers_4_wrote_it(tmp_path: Path) -> None:
    hf_model = hf_llama(**SHAPES["llama3 rope"])
    hf_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_logits(hf_model, tmp_path)


def test_dtype_on_the_way_in(tmp_path: Path) -> None:
    hf_llama().save_pretrained(tmp_path)
    model = load_model(find(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_missing_and_unexpected_tensors_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    hf_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    down = tensors.pop("model.layers.1.mlp.down_proj.weight")
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=r"missing tensors: layers\.1\.mlp\.down_proj\.weight"):
        load_model(find(tmp_path))
    save_file({**tensors, "model.layers.1.mlp.down_proj.weight": down, "model.extra": down.clone()}, file)
    with pytest.raises(ConfigError, match=r"unexpected tensors: model\.extra"):
        load_model(find(tmp_path))
    save_file({**tensors, "model.layers.1.mlp.down_proj.weight": down.T.contiguous()}, file)
    with pytest.raises(ConfigError, match=r"down_proj\.weight: expected shape \[48, 100\], got \[100, 48\]"):
        load_model(find(tmp_path))
    file.write_bytes(b"not safetensors")
    with pytest.raises(ConfigError, match=r"cannot read .*model\.safetensors"):
        load_model(find(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, "unknown architecture .*GPT2.*supported: llama"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn'"),
        ({"num_hidden_layers": None}, "lacks 'num_hidden_layers'"),
    ],
)
def test_configs_that_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    hf_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConfigError, match=message):
        load(tmp_path)


def test_paths_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no model at .*'smollm2'"):
        find(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no weights"):
        find(tmp_path)
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        find(tmp_path / "weights.bin")
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(ConfigError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        find(tmp_path)
    (tmp_path / "c.safetensors").touch()
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_model(find(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        load_model(find(tmp_path))


def test_an_absent_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    from vattn.models import loader

    monkeypatch.setitem(loader._PACKAGED, "smollm2", ("llm-not-there", "pip install llm-not-there"))
    with pytest.raises(ConfigError, match="pip install llm-not-there"):
        find("smollm2")


# GGUF ---------------------------------------------------------------------------------------------------------------


def test_gguf_names() -> None:
    assert hf_name("blk.12.attn_q.weight") == "layers.12.self_attn.q_proj.weight"
    assert hf_name("output_norm.weight") == "norm.weight"
    assert hf_name("blk.0.ffn_gate_exps.weight") is None
    assert hf_name("rope_freqs.weight") is None


def permute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """As llama.cpp's converter writes Q and K."""
    return tensor.unflatten(0, (num_heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def test_unpermute_undoes_the_converter() -> None:
    for shape in ((24, 5), (24,)):
        tensor = torch.randn(*shape)
        torch.testing.assert_close(unpermute(permute(tensor, 3), 3), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("shape", ["3 KV heads", "5 layers, one KV head, tied", "llama3 rope"])
def test_gguf_file_written_by_the_gguf_library(tmp_path: Path, shape: str) -> None:
    """Untied output, divided rotary frequencies and float16 tensors, none of which SmolLM2's file has."""
    gguf = pytest.importorskip("gguf")
    hf_model = hf_llama(**SHAPES[shape])
    config = LlamaConfig.from_hf(json.loads(hf_model.config.to_json_string(use_diff=False)))
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_divisors:
        writer.add_tensor("rope_freqs.weight", torch.tensor(config.rope_divisors, dtype=torch.float32).numpy())
    gguf_names = {hf_name(name): name for name in _gguf_names(config.num_layers)}
    for parameter in hf_model.parameters():  # so that float16 tensors hold them exactly
        parameter.data = parameter.data.half().float()
    for name, tensor in hf_model.state_dict().items():
        name = name.removeprefix("model.")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "q_proj" in name or "k_proj" in name:
            tensor = permute(tensor, config.num_heads if "q_proj" in name else config.num_kv_heads)
        writer.add_tensor(gguf_names[name], (tensor.half() if tensor.dim() > 1 else tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_same_logits(hf_model, tmp_path)


def _gguf_names(num_layers: int) -> list[str]:
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    names = [f"blk.{layer}.{part}.weight" for layer in range(num_layers) for part in parts]
    return [*names, "token_embd.weight", "output_norm.weight", "output.weight"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a GGUF file at all", b"GGUF" + b"\xff" * 60])
def test_files_that_are_no_gguf(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ConfigError, match=r"cannot read .*model\.gguf as a GGUF file"):
        load_model(find(tmp_path))


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match=r"unknown architecture 'mamba'.*supported: llama"):
        load(tmp_path)


# Tokenizers ---------------------------------------------------------------------------------------------------------


def test_end_of_turn_comes_from_the_chat_template(tmp_path: Path) -> None:
    """The tokenizer calls ``<|endoftext|>`` its end; the chat ends a turn with ``<|im_end|>``."""
    tokenizer = load_tokenizer(save_folder(tmp_path))
    end_of_text, end_of_turn = tokenizer.encode("<|endoftext|>"), tokenizer.encode("<|im_end|>")
    assert tokenizer.stop_tokens == {*end_of_text, *end_of_turn}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_tokenizer(tmp_path).stop_tokens == {7, 8, *end_of_text, *end_of_turn}


def test_chat_and_plain_prompts(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_folder(tmp_path / "chat"))
    tokens = tokenizer.encode_chat([{"role": "user", "content": "the fox"}])
    expected = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
    assert tokens == tokenizer.encode(expected)
    assert tokenizer.decode(tokens) == "user\nthe fox\nassistant\n"
    plain = load_tokenizer(save_folder(tmp_path / "plain", chat=False))
    assert not plain.has_chat_template
    with pytest.raises(ConfigError, match="no chat template"):
        plain.encode_chat([{"role": "user", "content": "the fox"}])


def test_streaming_gives_whole_characters(tmp_path: Path) -> None:
    """Bytes of one character come in several tokens; no piece shows half of one, and nothing is lost."""
    tokenizer = load_tokenizer(save_folder(tmp_path))
    text = "the fox → 🦊, ñandú, 日本語\n\nquick"
    tokens = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(tokens) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)

    cut = tokenizer.encode("fox 🦊")[:-1]  # ends inside the character
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in cut) == "fox "
    assert "\N{REPLACEMENT CHARACTER}" in stream.finish()
    assert stream.finish() == ""


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    hf_llama().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot read a tokenizer .* save the tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None,), "name or the folder"),
        (("smollm2", "tpu"), "device 'tpu' cannot be used"),
        (("smollm2", "cpu", "bfloat16"), "dtype must be"),
        (("smollm2", "cpu", torch.int8), "dtype must be"),
    ],
)
def test_arguments_of_load(arguments: tuple[Any, ...], message: str, tmp_path: Path) -> None:
    folder = save_folder(tmp_path)
    arguments = tuple(folder if argument == "smollm2" else argument for argument in arguments)
    with pytest.raises(ConfigError, match=message):
        load(*arguments)
