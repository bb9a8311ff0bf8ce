"""The HTTP front over a service, asked as clients ask."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from servegym.baselines.registry import make_policy
from servegym.engines.twin import Twin
from servegym.envs import Policy, ServegymError, load_task
from servegym.envs.task.config import with_overrides

pytest.importorskip("transformers")
pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

from servegym.engines.front import Front, Letters  # noqa: E402
from servegym.engines.huggingface import Service, generate, tiny_llama  # noqa: E402

MODEL = tiny_llama()


def new_service(capacity: int, policy: Policy | None = None) -> Service:
    task = with_overrides(load_task("GSM8KPredicted-v0"), {"cluster": {"clients": 2}})
    twin = Twin(task, policy or make_policy("hybrid"), capacity=capacity)
    return Service(MODEL, twin, kv_tokens=8192, batch_tokens=256, lasting=True)


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """One that holds eight requests, of which four may be there at once."""
    with new_service(8) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    front = Front(service, "tiny", Letters(1000), (), most_tokens=2000, room_tokens=2100)
    server = uvicorn.Server(uvicorn.Config(front.app(), port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def ask(url: str, body: bytes) -> str:
    request = urllib.request.Request(f"{url}/v1/completions", body)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def completion(url: str, **body: Any) -> Any:
    return json.loads(ask(url, json.dumps(body).encode()))


def test_an_answer_is_that_of_generate(url: str) -> None:
    answer = completion(url, prompt=[5, 6, 7], max_tokens=6, temperature=0)
    assert answer["choices"][0]["text"].split() == [str(t) for t in generate(MODEL, [5, 6, 7], 6)]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9}
    assert completion(url, prompt="ab", max_tokens=1)["usage"]["prompt_tokens"] == 2
    nothing = {
        "max_tokens": None,
        "stop": None,
        "n": None,
    }  # as some clients send what they leave out
    assert completion(url, prompt="\ud800", **nothing)["usage"]["total_tokens"] == 1 + 16


def test_a_stream_says_the_same_bit_by_bit(url: str) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 6, "stream": True}
    text = ask(url, json.dumps(body | {"stream_options": {"include_usage": True}}).encode())
    *events, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert last == "[DONE]"
    said = [json.loads(event) for event in events]
    words = "".join(event["choices"][0]["text"] for event in said[:-1])
    assert words == completion(url, prompt=[5, 6, 7], max_tokens=6)["choices"][0]["text"]
    assert said[-1]["usage"]["completion_tokens"] == 6
    assert said[-2]["choices"][0]["finish_reason"] == "length"


class Halves:
    """Two tokens a letter, as an emoji or a Chinese character may have; an odd one is half a letter."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "é" * (len(tokens) // 2) + "\ufffd" * (len(tokens) % 2)


class Emitting:
    """A service in which a request has one token more whenever it is looked at."""

    def __init__(self, most: int) -> None:
        self.tokens, self.most = 0, most

    def progress(self, _: str) -> tuple[list[int], bool]:
        self.tokens += 1
        return [1] * self.tokens, self.tokens == self.most


@pytest.mark.parametrize(("most", "words"), [(6, "ééé"), (7, "ééé\ufffd")])
def test_a_letter_that_is_still_to_be_completed_is_not_streamed(most: int, words: str) -> None:
    front = Front(Emitting(most), "m", Halves(), (), 10, 10)  # type: ignore[arg-type]

    async def said() -> list[str]:
        return [event async for event in front._streamed("0", 1, most, usage=False)]

    *events, _ = asyncio.run(said())
    texts = [json.loads(event[6:])["choices"][0]["text"] for event in events]
    assert "".join(texts) == words


def test_a_client_that_goes_away_cancels_its_request(url: str, service: Service) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 2000, "stream": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.readline()
    name = max(service.asked, key=int)
    until = time.perf_counter() + 30
    while name not in service.cancelled and time.perf_counter() < until:
        time.sleep(0.02)
    completion(url, prompt=[1], max_tokens=1)  # an iteration later it has gone
    log, row = service.twin.records(), service.twin.ids.index(int(name))
    assert 0 < log.decode_rounds[row] < 1999
    assert np.isfinite(log.finished_s[row])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"x", "the body must be JSON"),
        (b"[]", "the body must be a JSON object"),
        (b"{}", "prompt must be one text or one list of token ids"),
        (b'{"prompt": [1.5]}', "prompt must be one text or one list of token ids"),
        (b'{"prompt": ["a", "b"]}', "one text or one list of token ids"),
        (b'{"prompt": [1], "echo": true}', "echo must be False, got True"),
        (b'{"prompt": [1], "stop": ["x"]}', "stop must be [], got ['x']"),
        (b"[" * 100_000, "the body must be JSON"),
        (b'{"prompt": [1000]}', "token ids 0 … 999"),
        (b'{"prompt": []}', "at least one"),
        (b'{"prompt": [1], "max_tokens": 0}', "max_tokens must lie in 1 … 2000, got 0"),
        (b'{"prompt": [1], "max_tokens": 2001}', "max_tokens must lie in 1 … 2000, got 2001"),
        (b'{"prompt": [1], "n": 2}', "n must be 1"),
    ],
)
def test_what_is_no_request_is_refused(url: str, body: bytes, message: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(url, body)
    assert refused.value.code == 400
    assert message in json.loads(refused.value.read())["error"]["message"]


def test_a_prompt_without_room_is_refused(url: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        completion(url, prompt=[1] * 101, max_tokens=2000)
    assert "101 tokens and 2000 more exceed 2100" in refused.value.read().decode()
    assert completion(url, prompt=[1] * 100, max_tokens=1)["usage"]["total_tokens"] == 101


# ---- a server that runs for days ----------------------------------------------------------------


def test_more_requests_than_there_is_room_for_are_served(url: str, service: Service) -> None:
    for number in range(20):
        answer = completion(url, prompt=[5, 6, 7], max_tokens=1 + number % 3)
        assert answer["usage"]["completion_tokens"] == 1 + number % 3
    scheduler, twin = service.scheduler, service.twin
    assert twin.submitted > 20
    assert len(twin.ids) == len(twin.records().finished_s) <= 8
    assert len(service.asked) == len(scheduler.ids) == len(scheduler.states) == len(twin.ids)
    assert scheduler.present_requests == 0
    served = {i for each in scheduler.iterations for i in each.ids}
    assert served <= set(range(twin.ids[0] - 2, twin.submitted))
    service.collect()
    assert service.answers.keys() <= service.asked.keys()
    assert service.cancelled <= service.asked.keys()
    assert service.manager.output_router.output_queue.empty()
    with pytest.raises(ServegymError, match="request 0 has been forgotten"):
        service.progress("0")
    service.cancel("0")
    assert "0" not in service.cancelled


def test_who_finds_no_room_is_told_to_come_again(url: str, service: Service) -> None:
    names = [service.submit([1, 2], 500) for _ in range(4)]
    with pytest.raises(urllib.error.HTTPError) as refused:
        completion(url, prompt=[1], max_tokens=1)
    assert refused.value.code == 503
    assert "4 requests are there, which is the most" in refused.value.read().decode()
    for name in names:
        service.cancel(name)
    until = time.perf_counter() + 30
    while service.scheduler.present_requests and time.perf_counter() < until:
        time.sleep(0.02)
    assert completion(url, prompt=[1], max_tokens=1)["usage"]["completion_tokens"] == 1


def test_a_service_that_lasts_needs_room_for_two() -> None:
    with pytest.raises(ServegymError, match="needs a twin with a capacity of 2 or more, got 1"):
        new_service(1)


# ---- faults -------------------------------------------------------------------------------------


def test_a_fault_of_the_model_is_told_at_once_with_its_cause() -> None:
    faults: list[str] = []

    async def answers(service: Service) -> list[str]:
        front = Front(service, "m", Letters(1000), (), 2000, 2100, lambda: faults.append("ended"))
        async with front._lifespan(front.app()):
            name = service.submit([1, 2], 2000)
            events = [event async for event in front._streamed(name, 2, 2000, usage=False)]
            while not front.fault:
                await asyncio.sleep(0.01)
        return events

    def fails(*_: Any) -> None:
        raise RuntimeError("out of\nmemory")

    with new_service(8) as service:
        service.manager.batch_processor._generation_step = fails
        events = asyncio.run(answers(service))
    told = {"message": "the engine's thread has ended: RuntimeError: out of memory"}
    assert json.loads(events[-1][6:])["error"] == told | {"type": "server_error"}
    assert faults == ["ended"]
    assert service.twin.records().decode_rounds.tolist() == [1999]  # nothing was run
