"""Metrics, the status page and the dashboard, of a real engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.llama import small_model

from vattn import Engine, Request
from vattn.serve import status

prometheus_client = pytest.importorskip("prometheus_client")
from prometheus_client.parser import text_string_to_metric_families  # noqa: E402

from vattn.serve.metrics import Metrics  # noqa: E402

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(small_model(), max_batch=4, memory_limit=64 << 20) as engine:
        yield engine


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name and labels, less the model's name."""
    text, kind = metrics.render()
    assert kind.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            if sample.name.startswith("vattn:") and not sample.name.endswith("_created"):
                assert sample.labels.get("model_name", "m") == "m"
            found[sample.name + "".join(f" {name}={value}" for name, value in labels.items())] = sample.value
    return found


def test_metrics_are_those_of_the_engine(engine: Engine) -> None:
    metrics = Metrics(engine, "m")
    before = samples(metrics)
    assert before["vattn:num_requests_running"] == before["vattn:time_to_first_token_seconds_count"] == 0
    engine.submit(Request([1, 2, 3], 20, n=3))
    engine.submit(Request([4, 5], 20, n=2))
    for _ in range(6):
        engine.step()
    now, stats, cache = samples(metrics), engine.stats(), engine.cache.stats()
    assert now["vattn:num_requests_running"] == stats.num_running == 4
    assert now["vattn:num_requests_waiting"] == stats.num_waiting == 1
    assert now["vattn:kv_cache_usage_perc"] == stats.kv_usage > 0
    assert now["vattn:generation_tokens_total"] == stats.num_decode_tokens > 0
    assert now["vattn:cache_bytes kind=in_use"] == cache.in_use_bytes > 0
    assert now["vattn:cache_driver_calls_total call=map"] == cache.num_map > 0
    kinds = ("in_use", "parked", "free", "index")
    assert sum(now[f"vattn:cache_bytes kind={kind}"] for kind in kinds) == now["vattn:cache_physical_bytes"]


def test_histograms_keep_every_duration(engine: Engine) -> None:
    engine.generate([Request([1, 2, 3], 20, n=3)])
    now, stats = samples(Metrics(engine, "m")), engine.stats()
    for name, durations in (
        ("time_to_first_token_seconds", stats.first_token_s),
        ("inter_token_latency_seconds", stats.between_tokens_s),
        ("request_queue_time_seconds", stats.queue_s),
    ):
        assert now[f"vattn:{name}_count"] == now[f"vattn:{name}_bucket le=+Inf"] == durations.count > 0
        assert now[f"vattn:{name}_sum"] == pytest.approx(durations.sum)
        buckets = {key: value for key, value in now.items() if key.startswith(f"vattn:{name}_bucket")}
        assert len(buckets) == 30
        for key, value in buckets.items():
            bound = float(key.partition("le=")[2])
            below = sum(n for n, most in zip(durations.counts, durations.bounds, strict=False) if most <= bound * 1.001)
            assert value == (below if bound < float("inf") else durations.count)


def test_what_a_server_observes(engine: Engine) -> None:
    metrics = Metrics(engine, "m")
    metrics.observe_request(num_prompt_tokens=30, num_new_tokens=7, finish_reasons=["stop", "length", None], seconds=3)
    metrics.observe_request(num_prompt_tokens=10, num_new_tokens=1, finish_reasons=["stop"], seconds=0.3)
    metrics.observe_response("/v1/models", 200)
    metrics.observe_response("other", 404)
    now = samples(metrics)
    assert now["vattn:prompt_tokens_total"] == 40
    assert now["vattn:request_success_total finished_reason=stop"] == 2
    assert now["vattn:request_success_total finished_reason=cancelled"] == 1
    assert now["vattn:e2e_request_latency_seconds_count"] == 2
    assert now["vattn:e2e_request_latency_seconds_bucket le=0.5"] == 1
    assert now["vattn:request_prompt_tokens_sum"] == 40
    assert now["vattn:request_generation_tokens_sum"] == 8
    assert now["vattn:request_params_n_sum"] == 4
    assert now["vattn:http_requests_total handler=other status=404"] == 1
    assert now["process_resident_memory_bytes"] > 0
    # Each server has figures of its own.
    assert samples(Metrics(engine, "m")).get("vattn:prompt_tokens_total", 0) == 0


def test_a_closed_engine_has_metrics_all_the_same() -> None:
    with Engine(small_model(), max_batch=2, memory_limit=64 << 20) as engine:
        metrics = Metrics(engine, "m")
    assert samples(metrics)["vattn:num_requests_running"] == 0


# vLLM's, for dashboards and autoscalers that know those.
VLLM = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries_total prefix_cache_hits_total
num_preemptions_total prompt_tokens_total generation_tokens_total request_success_total
time_to_first_token_seconds_bucket inter_token_latency_seconds_bucket e2e_request_latency_seconds_bucket
request_queue_time_seconds_bucket request_prompt_tokens_bucket request_generation_tokens_bucket
request_params_n_bucket"""


def test_the_names_are_vllms(engine: Engine) -> None:
    metrics = Metrics(engine, "m")
    metrics.observe_request(num_prompt_tokens=1, num_new_tokens=1, finish_reasons=["stop"], seconds=1)
    names = {name.partition(" ")[0] for name in samples(metrics)}
    assert {f"vattn:{name}" for name in VLLM.split()} <= names


def test_the_dashboard_asks_for_metrics_that_there_are(engine: Engine) -> None:
    metrics = Metrics(engine, "m")
    metrics.observe_request(num_prompt_tokens=1, num_new_tokens=1, finish_reasons=["stop"], seconds=1)
    metrics.observe_response("/v1/models", 200)
    names = {name.partition(" ")[0] for name in samples(metrics)}
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(asked) >= 12
    used = set(re.findall(r"(?:vattn:|process_)\w+", " ".join(asked)))
    assert used <= names
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_snapshot_is_the_engines(engine: Engine) -> None:
    engine.submit(Request([1, 2, 3], 20, n=2))
    for _ in range(5):
        engine.step()
    found = json.loads(json.dumps(status.snapshot(engine, "m")))
    assert (found["model"], found["running"], found["waiting"]) == ("m", 2, 0)
    assert found["memory"] == engine.cache.stats().as_dict()
    lengths = {each["slot"]: each["tokens"] for each in found["slots"]}
    assert lengths == {slot: engine.cache.seq_len(slot) for slot in lengths}
    assert sum(lengths.values()) * found["bytes_per_token"] == found["memory"]["row_bytes"]
    assert found["first_token_s"]["count"] == 2
    assert 0 < found["first_token_s"]["p50"] <= found["first_token_s"]["p99"]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "action", "srcset") and not (value or "").startswith("data:"):
                self.outside.append(f"{tag} {name}={value}")


def test_the_page_needs_nothing_from_outside() -> None:
    text = status.page().decode()
    page = Page()
    page.feed(text)
    assert page.outside == []
    assert len(page.ids) == len(set(page.ids))
    assert re.findall(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)", text) == []
    assert re.findall(r'fetch\("([^"]*)"', text) == ["status.json"]
    # The script fills in elements that there are, by figures that there are.
    script = text.partition("<script>")[2]
    assert set(re.findall(r'(?:at|show)\("(\w+)"', script)) <= set(page.ids)
    with Engine(small_model(), max_batch=2, memory_limit=64 << 20) as engine:
        figures = status.snapshot(engine)
    assert set(re.findall(r"\bnow\.(\w+)", script)) <= set(figures)
    assert set(re.findall(r"\bm\.(\w+)", script)) <= set(figures["memory"])
