"""A ``TransformersModel`` beside everything else: what it refuses, what it leaves of the model, who can run it."""

from __future__ import annotations

import copy
import io
import json
import threading

import pytest
import torch

transformers = pytest.importorskip("transformers")
from helpers.hf_models import CACHE, MODELS, close, logits, make_model, prompt, with_cache  # noqa: E402
from helpers.llama import save_folder  # noqa: E402

from vattn import ConfigError, Engine, KVCache, KVLayout, Request, Sampling  # noqa: E402
from vattn.attention import SINKS, SOFTCAP, AttentionBatch, DecodeBatch, bind, get  # noqa: E402
from vattn.cli.main import main  # noqa: E402
from vattn.decode import DecodeLoop  # noqa: E402
from vattn.hf import TransformersModel, VirtualCache  # noqa: E402

TEXT = prompt(1, seed=3, length=13)


@pytest.fixture(scope="module")
def model():
    return make_model("Llama")


@pytest.fixture
def ours(model):
    with TransformersModel(model) as ours:
        yield ours


def greedy(model, tokens=TEXT, new=12, **options):
    out = model.generate(tokens, max_new_tokens=new, do_sample=False, **options)
    return out[0, tokens.shape[1] :].tolist()


def by_engine(model, tokens=TEXT, new=12, **options):
    with Engine(model, max_batch=2, **options) as engine:
        return list(engine.generate([Request(tokens[0].tolist(), max_new_tokens=new)])[0].tokens)


# -- the model, as it was ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Qwen3-MoE", "Phi-3, longrope"])
def test_the_model_outside_of_passes_and_after_close(name):
    model = make_model(name)
    before, scores = model.config.to_dict(), logits(model, TEXT)
    implementation, experts = model.config._attn_implementation, model.get_experts_implementation()
    kept = {name: vars(module).copy() for name, module in model.named_modules()}
    with TransformersModel(model) as ours:
        with Engine(ours, max_batch=2) as engine:
            engine.submit(Request(TEXT[0].tolist(), max_new_tokens=30))
            for _ in range(6):
                engine.step()
                assert torch.equal(logits(model, TEXT), scores)
        wanted = greedy(model)
        with VirtualCache(model.config, max_length=64) as past:
            assert greedy(model, **with_cache(past)) == wanted
    assert (model.config._attn_implementation, model.get_experts_implementation()) == (implementation, experts)
    assert model.config.to_dict() == before
    assert torch.equal(logits(model, TEXT), scores)
    for name, module in model.named_modules():
        assert vars(module).keys() == kept[name].keys(), name
    ours.close()  # once more


@pytest.mark.parametrize("name", ["Phi-3, longrope", "Llama, dynamic NTK"])
def test_frequencies_that_follow_the_longest_text(name):
    """Others may run long texts between the passes, whose own texts are short."""
    model, long = make_model(name), prompt(1, seed=5, length=200)
    short, expected = greedy(model), logits(model, long)
    with TransformersModel(model) as ours:
        for _ in range(2):
            assert by_engine(ours) == short
            assert torch.equal(logits(model, long), expected)
    assert greedy(model) == short


def test_another_thread_runs_the_model_meanwhile(model, ours):
    wanted, found, stop = logits(model, TEXT), [], threading.Event()

    def run():
        while not stop.is_set():
            found.append(torch.equal(logits(model, TEXT), wanted))

    thread = threading.Thread(target=run)
    expected = greedy(model, new=40)
    thread.start()
    try:
        assert by_engine(ours, new=40) == expected
    finally:
        stop.set()
        thread.join()
    assert found
    assert all(found)


def test_a_pass_that_fails_leaves_the_model_to_others(model, ours):
    wanted = logits(model, TEXT)
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with Engine(ours, max_batch=2) as engine:
        (failed,) = engine.generate([Request(TEXT[0].tolist(), max_new_tokens=3)])
    hook.remove()
    assert isinstance(failed.error, ZeroDivisionError)
    assert torch.equal(logits(model, TEXT), wanted)
    assert by_engine(ours) == greedy(model)


def test_a_model_that_the_engine_was_given(model):
    implementation, wanted = model.config._attn_implementation, greedy(model)
    assert by_engine(model) == wanted
    assert model.config._attn_implementation == implementation
    with pytest.raises(ConfigError, match="has no sinks"):
        Engine(make_model("GPT-OSS"), attention="sdpa")
    with pytest.raises(ConfigError, match="open the cache with"):
        Engine(model, KVCache(KVLayout(2, 2, 16, 64, torch.float32), 3, "cpu"))
    assert model.config._attn_implementation == implementation
    with pytest.raises(ConfigError, match=r"as transformers loads it or .* not a dict"):
        Engine({})


# -- what runs it ------------------------------------------------------------------------------------------------------
def test_a_decode_loop(model, ours):
    """Without an engine; a prefill for the prompt but its last token, then steps."""
    with KVCache(ours.kv_layout(64), 3, "cpu", page_bytes=4096) as cache:
        slot, row = cache.acquire(), TEXT[0, :-1]
        cache.ensure(slot, len(row))
        with torch.inference_mode(), cache.step([slot]):
            batch = AttentionBatch.build([slot], [len(row)], [len(row)], "cpu")
            ours.prefill(row, batch, cache, get("sdpa"))
        with DecodeLoop(ours, cache) as loop:
            loop.start(slot, int(TEXT[0, -1]), 12)
            found = [each.token for each in loop.run()]
    assert found == greedy(model)


def test_sampling_is_the_engines(ours):
    sampling = Sampling(temperature=0.8, top_k=20, seed=5)
    request = Request(TEXT[0].tolist(), max_new_tokens=12, sampling=sampling, n=3, num_logprobs=2)
    with Engine(ours, max_batch=4) as engine:
        one = [each.tokens for each in engine.generate([request])]
        assert one == [each.tokens for each in engine.generate([Request([1], max_new_tokens=20), request])[1:]]
    assert len({tuple(tokens) for tokens in one}) == 3


@torch.inference_mode()
def test_prompts_and_steps_in_one_pass(model, ours):
    """The same logits as in two passes, and none of the prompt's."""
    texts, sdpa = [prompt(1, seed=7, length=9)[0], prompt(1, seed=8, length=5)[0]], get("sdpa")

    def of(*slots, new, end):
        return AttentionBatch.build(slots, new, end, "cpu")

    found = []
    for mixed in (False, True):
        with KVCache(ours.kv_layout(64), 2, "cpu", page_bytes=4096) as cache:
            cache.acquire(), cache.acquire()
            cache.ensure_batch([0, 1], [9, 5])
            step = DecodeBatch(*torch.tensor([[0], [8], [9]], dtype=torch.int32), 64, texts[0][8:].int())
            late = of(1, new=[5], end=[5])
            with cache.step([0, 1]):
                ours.prefill(texts[0][:8], of(0, new=[8], end=[8]), cache, sdpa)
                if mixed:
                    out = ours.prefill_and_decode(texts[1], late, sdpa, torch.empty(1, 1), step, bind(sdpa), cache)
                else:
                    ours.prefill(texts[1], late, cache, sdpa)
                    out = ours.decode(torch.empty(1, 1), step, cache, bind(sdpa))
            rows = [cache.rows(slot, 3)[0][: len(texts[slot])].clone() for slot in (0, 1)]
            found.append([out, *rows])
    assert found[0][0].shape == (1, model.config.vocab_size)
    for one, other in zip(*found, strict=True):
        close(one, other)
    close(found[0][0], logits(model, texts[0][None])[:, -1])


@pytest.mark.parametrize(
    ("name", "features"), [("Llama", set()), ("Gemma 2", {SOFTCAP}), ("GPT-OSS", {SINKS}), ("Gemma 3", set())]
)
def test_what_attention_needs(name, features):
    with TransformersModel(make_model(name)) as ours:
        assert ours.attention_features == features
        assert ours.num_heads == 4
        windows = {layer: group.window for group in ours.kv_layout().groups for layer in group.layers}
        mixed = {"Gemma 3": {0: 16, 1: None, 2: 16, 3: None}, "GPT-OSS": {0: 16, 1: None, 2: 16, 3: None}}
        assert windows == mixed.get(name, windows)


def test_layers_that_share_k_and_v_have_one_copy():
    with TransformersModel(make_model("Gemma 4, shared K and V")) as ours:
        assert ours.kv_layout().layers == (0, 1)


# -- the command line --------------------------------------------------------------------------------------------------
def test_generate_and_chat_with_a_family_of_transformers_alone(tmp_path, capfd, monkeypatch):
    folder = save_folder(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind, arguments = MODELS["Gemma 3"]
    arguments = {**arguments, "vocab_size": len(tokenizer)}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**arguments)).eval()
    model.save_pretrained(folder)
    capfd.readouterr()
    options = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "8"]
    assert main(["generate", "the fox", "--raw", *options, "--json"]) == 0
    captured = capfd.readouterr()
    document = json.loads(captured.out)
    tokens = tokenizer("the fox", return_tensors="pt").input_ids
    model.generation_config.eos_token_id = None
    assert document["requests"][0]["tokens"] == greedy(model, tokens, new=8)
    monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n"))
    assert main(["chat", *options]) == 0
    assert "of K and V" in capfd.readouterr().err


# -- refusals ----------------------------------------------------------------------------------------------------------
def other(change):
    def make():
        model = make_model("Llama")
        change(model)
        return model

    return make


def spread(model):
    model.lm_head.to("meta")


def positions_of_its_own(model):
    """As of a model that counts from the start of the pass: right alone, wrong beside another text."""
    forward = model.model.rotary_emb.forward
    model.model.rotary_emb.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None])


def encoder_decoder():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def recurrent():
    config = transformers.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config).eval()


def headless():
    return transformers.LlamaModel(make_model("Llama").config).eval()


class OddConfig(transformers.PreTrainedConfig):
    model_type = "odd"


class Odd(transformers.PreTrainedModel):
    config_class = OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.eval()


BAD = {
    "no model": (lambda: 3, "takes a model of transformers, got a int"),
    "a config": (lambda: make_model("Llama").config, "takes a model of transformers, got a LlamaConfig"),
    "training": (other(lambda model: model.train()), r"training mode: call model\.eval\(\)"),
    "checkpointing": (other(lambda model: model.gradient_checkpointing_enable()), "gradient_checkpointing_disable"),
    "spread": (other(spread), "is on cpu and meta, a TransformersModel needs it on one"),
    "no vocabulary": (lambda: Odd(OddConfig()), "OddConfig has no vocab_size"),
    "resized": (other(lambda model: setattr(model.config, "vocab_size", 90)), "set config.vocab_size"),
    "own positions": (other(positions_of_its_own), "its logits over a cache are off by"),
    "encoder-decoder": (encoder_decoder, "is an encoder-decoder, TransformersModel takes decoder-only models"),
    "encoder": (lambda: make_encoder(), "says is_decoder=False"),
    "recurrent": (recurrent, "no attention layers|takes no cache"),
    "no head": (headless, "LlamaModel has no head"),
}


def make_encoder():
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertLMHeadModel(config).eval()


@pytest.mark.parametrize("case", BAD)
def test_refused(case):
    make, message = BAD[case]
    model = make()
    with pytest.raises(ConfigError, match=message):
        TransformersModel(model)


@pytest.mark.parametrize("options", [{"ops": 3}, {"fuse": "no"}, {"fuse": 1}], ids=str)
def test_options_that_are_refused(model, options):
    (name, value) = next(iter(options.items()))
    with pytest.raises(ConfigError, match=f"{name} must be .* got {value!r}"):
        TransformersModel(model, **options)


@pytest.mark.parametrize("max_seq_len", [0, 7, 513, 2.5, "9", True])
def test_lengths_that_are_refused(model, max_seq_len):
    with pytest.raises(ConfigError, match="max_seq_len"):
        TransformersModel(model, max_seq_len=max_seq_len)
    assert model.config._attn_implementation == "sdpa"


def test_how_long_a_text_may_be(model):
    with TransformersModel(model, max_seq_len=20) as ours:
        assert ours.kv_layout().max_seq_len == 20
        with Engine(ours, max_batch=1) as engine, pytest.raises(ConfigError, match="exceed the context of 20"):
            engine.submit(Request(TEXT[0].tolist(), max_new_tokens=9))
    for name, limit in (("Llama", 512), ("Llama 4, chunks", 16), ("Phi-3, longrope", 128), ("Llama, dynamic NTK", 128)):
        with TransformersModel(make_model(name)) as ours:
            assert ours.max_seq_len == limit


def test_used_wrongly(model, ours):
    with pytest.raises(ConfigError, match="another TransformersModel runs this LlamaForCausalLM"):
        TransformersModel(model)
    with KVCache(ours.kv_layout(64), 3, "cpu", page_bytes=4096) as cache:
        slot = cache.acquire()
        cache.ensure(slot, 5)
        row, batch = TEXT[0, :5], AttentionBatch.build([slot], [5], [5], "cpu")
        with pytest.raises(ConfigError, match="5 new tokens, got a tensor of shape"):
            ours.prefill(row[:3], batch, cache, get("sdpa"))
        with pytest.raises(ConfigError, match="give the DecodeBatch its tokens"):
            ours.decode(row, DecodeBatch(*torch.zeros(3, 1, dtype=torch.int32), 64), cache, get("sdpa"))
        padded = AttentionBatch((slot,), (5,), (5,), torch.device("cpu"), (1,))
        with pytest.raises(ConfigError, match="packed tokens"):
            ours.prefill(row, padded, cache, get("sdpa"))
        model.train()
        with pytest.raises(ConfigError, match="training mode"):
            ours.prefill(row, batch, cache, get("sdpa"))
        model.eval()
        ours.close()
        with pytest.raises(ConfigError, match="is closed"):
            ours.prefill(row, batch, cache, get("sdpa"))
        with pytest.raises(ConfigError, match="is closed"):
            Engine(ours, cache)


def test_its_cache_outside_of_a_pass(model, ours):
    with torch.no_grad(), pytest.raises(ConfigError, match="works in its passes only"):
        model(TEXT, **{CACHE: ours._cache})
    copied = copy.deepcopy(model)
    assert greedy(copied) == greedy(model)
