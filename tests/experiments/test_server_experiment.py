"""The client of experiment 17: what it times are the requests' own tokens, at a server and at an engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("transformers")
pytest.importorskip("aiohttp")
pytest.importorskip("openai")
sys.path.insert(0, str(Path(__file__).parents[2] / "experiments" / "17_server"))
import client
from helpers.llama import save_folder
from helpers.server import NAME, running

from vattn import Engine
from vattn.models import load


def test_every_request_gets_its_tokens(tmp_path):
    model, tokenizer = load(save_folder(tmp_path))
    case = client.Case("tiny", model.config.vocab_size, requests=12, streams=4, prompt=(5, 20), answer=(3, 9))
    trace = case.trace(1)
    assert trace == case.trace(1) != case.trace(2)
    with Engine(model, max_batch=4, memory_limit=1 << 28) as engine:
        alone = client.at_engine(engine, trace, case.streams)
        assert not engine.has_work
    with running(lambda: Engine(model, max_batch=4, memory_limit=1 << 28), tokenizer) as server:
        served = client.at_server(server.url, NAME, trace, case.streams)
        with pytest.raises(RuntimeError, match="404"):
            client.at_server(server.url, "another", trace, case.streams)
    for run in (alone, served):
        assert [each.num_tokens for each in run.answers] == [new for _, new in trace]
        assert all(each.begin <= each.came[0] for each in run.answers)
        assert all(each.came == sorted(each.came) for each in run.answers)
        assert run.metrics()["tokens_per_s"] == pytest.approx(sum(new for _, new in trace) / run.seconds)
    assert [len(each.came) for each in alone.answers] == [new for _, new in trace]
