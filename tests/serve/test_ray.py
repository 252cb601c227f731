"""Two replicas of SmolLM2 on a Ray cluster of this machine: prompts go where they are stored, and one dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("ray", reason="Ray is not installed: pip install 'vattn[ray]'")

import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.util.state import list_actors

from vattn.errors import ConfigError
from vattn.models.loader import find
from vattn.serve.ray import Options, Replica, _Asked, _Front, api_keys, build_app
from vattn.serve.ray_router import prefix_of

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
KEY = "a-key"
SHARED = "{} is the number of this story, which goes on. " + "The fox jumps over the lazy dog. " * 40


@dataclass
class Cluster:
    url: str
    client: openai.OpenAI

    def asked(self, prompt: str, **more: Any) -> tuple[str, Any]:
        """Who answered, and what."""
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 1, "temperature": 0, **more}
        found = self.client.completions.with_raw_response.create(**body)
        return found.headers["x-vattn-replica"], found.parse()

    def metrics(self, name: str) -> dict[str, float]:
        """By replica."""
        asked = urllib.request.Request(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked, timeout=60) as answer:
            text = answer.read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {sample.labels["replica"]: sample.value for sample in samples if sample.name == f"vattn:{name}"}

    def actor_of(self, replica: str) -> Any:
        (actor,) = [each for each in list_actors(filters=[("state", "=", "ALIVE")]) if replica in (each.name or "")]
        return actor

    def running_at(self, replica: str) -> float:
        return self.metrics("num_requests_running").get(replica, 0)


def until(condition: Any, seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    try:
        find("smollm2")
    except ConfigError as error:
        if os.environ.get("VATTN_REQUIRE_MODEL"):
            raise
        pytest.skip(str(error))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("VATTN_API_KEY", KEY)
        ray.init(
            num_cpus=2, include_dashboard=True, dashboard_port=0, object_store_memory=100 << 20, log_to_driver=False
        )
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            options = Options(num_replicas=2, memory_limit="128MiB", max_model_len=2048, health_period=1)
            serve.run(build_app(options), name="vattn")
            url = f"http://127.0.0.1:{port}"
            yield Cluster(url, openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120))
        finally:
            serve.shutdown()
            ray.shutdown()


def test_prompts_go_where_they_are_stored_and_outlive_a_replica(cluster: Cluster) -> None:
    # Who has which prompts is a matter of names that Ray draws.
    owners: dict[str, str] = {}
    for number in range(200):
        prompt = SHARED.format(number)
        replica, answer = cluster.asked(prompt)
        assert answer.usage.prompt_tokens_details.cached_tokens < 100
        owners.setdefault(replica, prompt)
        if len(owners) == 2:
            break
    (lost, prompt), (other, _) = owners.items()
    before = cluster.metrics("prefix_cache_hits_total")
    for replica, begins in owners.items():
        answered, answer = cluster.asked(begins + "So")
        assert answered == replica
        assert answer.usage.prompt_tokens_details.cached_tokens > 300
    after = cluster.metrics("prefix_cache_hits_total")
    assert all(after[replica] - before[replica] > 300 for replica in owners)

    with ThreadPoolExecutor() as threads:
        stream = cluster.client.completions.create(
            model="smollm2", prompt=prompt, max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        whole = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
        waiting = [threads.submit(cluster.asked, prompt, **whole) for _ in range(2)]
        until(lambda: cluster.running_at(lost) == 3)
        os.kill(cluster.actor_of(lost).pid, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the replica that answered was lost"):
            for _ in stream:
                pass
        for each in waiting:  # nothing of them had been sent
            replica, answer = each.result()
            assert replica != lost
            assert answer.usage.completion_tokens == 200
    until(lambda: len(cluster.metrics("num_requests_running").keys() - {lost}) == 2)
    assert other in cluster.metrics("num_requests_running")


def test_a_replica_that_dies_while_it_is_asked_for_metrics_is_left_out(cluster: Cluster) -> None:
    lost, other = until(lambda: len(found := list(cluster.metrics("num_requests_running"))) == 2 and found)
    actor = cluster.actor_of(lost)
    os.kill(actor.pid, signal.SIGSTOP)  # it is asked, and does not answer
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(cluster.metrics, "num_requests_running")
        time.sleep(1)
        assert not asked.done()
        os.kill(actor.pid, signal.SIGKILL)
        assert list(asked.result()) == [other]


def test_without_the_key_nothing_gets_to_a_replica(cluster: Cluster) -> None:
    with pytest.raises(openai.AuthenticationError):
        cluster.client.with_options(api_key="another").models.list()
    assert [model.id for model in cluster.client.models.list()] == ["smollm2"]
    with pytest.raises(openai.BadRequestError, match="no_such_field"):
        cluster.asked("x", extra_body={"no_such_field": 1})


def test_a_client_that_goes_ends_its_request(cluster: Cluster) -> None:
    stream = cluster.client.completions.create(
        model="smollm2", prompt="x", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert sum(cluster.metrics("num_requests_running").values()) == 1
    stream.close()
    until(lambda: not sum(cluster.metrics("num_requests_running").values()))


def test_a_replica_that_is_to_stop_finishes_what_it_has(cluster: Cluster) -> None:
    with ThreadPoolExecutor(1) as threads:
        answered = threads.submit(cluster.asked, "x", max_tokens=200, extra_body={"ignore_eos": True})
        until(lambda: sum(cluster.metrics("num_requests_running").values()) == 1)
        serve.delete("vattn")
        assert answered.result()[1].usage.completion_tokens == 200


def test_what_prompts_are_kept_apart_by() -> None:
    long = b"a" * 2000
    assert prefix_of(b'{"prompt": "%b b"}' % long) == prefix_of(b'{"prompt": "%b c", "n": 2}' % long)
    assert prefix_of(b'{"prompt": "b%b"}' % long) != prefix_of(b'{"prompt": "c%b"}' % long)
    assert prefix_of(b'{"prompt": "b", "user": "x"}') != prefix_of(b'{"prompt": "b"}')
    assert prefix_of(b'{"messages": [{"role": "user", "content": "b"}]}') != b""
    for nothing in (b"", b"{", b"[1]", b"{}", b'{"prompt": ""}', b"\xff"):
        assert prefix_of(nothing) == b""


def test_the_manifest_is_what_the_application_takes() -> None:
    yaml = pytest.importorskip("yaml")
    manifest = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "rayservice.yaml").read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    (application,) = yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "vattn.serve.ray:build_app"
    Options(**application["args"])


@pytest.mark.parametrize("key", [None, "", " ", "two words", "schl\u00fcssel"])
def test_a_front_without_a_key_does_not_start(monkeypatch, key):
    """A worker of a cluster does not see the environment of who calls serve run."""
    monkeypatch.delenv("VATTN_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("VATTN_API_KEY", key)
    with pytest.raises(ConfigError, match="no_api_key"):
        api_keys(Options())


def test_everybody_may_come_in_where_that_is_said(monkeypatch):
    monkeypatch.delenv("VATTN_API_KEY", raising=False)
    assert api_keys(Options(no_api_key=True)) == []
    monkeypatch.setenv("VATTN_API_KEY", "secret")
    assert api_keys(Options()) == ["secret"]
    with pytest.raises(ConfigError, match="one of them"):
        api_keys(Options(no_api_key=True))


@pytest.mark.parametrize("wrong", [0, -1, "many"])
def test_at_least_one_replica(wrong):
    with pytest.raises(ValueError, match="num_replicas"):
        Options(num_replicas=wrong)
    assert Options(num_replicas="auto").num_replicas == "auto"


def test_where_no_replica_can_be_asked_a_front_pauses_between_its_attempts():
    """Ray says so at once, of a deployment that failed. Here it always does; a cluster would need to break in time."""
    begins, sent = [], []

    class Failed:
        def options(self, **_):
            return self

        def remote(self, *_, **__):
            begins.append(time.monotonic())
            return self

        async def __aiter__(self):
            raise DeploymentUnavailableError("Replica")
            yield

        def cancel(self):
            pass

    async def send(message):
        sent.append(message)

    asyncio.run(_Front(Failed())._answer(_Asked({"type": "http"}, b""), b"", send))
    gaps = [later - earlier for earlier, later in pairwise(begins)]
    assert len(gaps) == 4
    assert all(gap > 0.09 * 2**i for i, gap in enumerate(gaps))
    assert sent[0]["status"] == 503


@pytest.mark.parametrize("raises", [True, False])
def test_an_answer_that_is_cut_off_raises_behind_its_parts(raises):
    """However fast its parts are read, it neither hangs nor looks complete."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"one", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        if raises:
            raise ValueError("broken")

    replica = object.__new__(Replica)
    replica._app, replica._name = app, b"r"

    found = []

    async def read():
        async for each in replica.answer(_Asked({"type": "http"}, b""), b""):
            found.append(each)
            await asyncio.sleep(0.01)  # meanwhile the app fails, with a part in the queue

    with pytest.raises(ValueError if raises else RuntimeError):
        asyncio.run(asyncio.wait_for(read(), 30))
    assert found[1:] == [b"one", b"two"]
