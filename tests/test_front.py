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
from servegym.envs import load_task
from servegym.envs.task.config import with_overrides

pytest.importorskip("transformers")
pytest.importorskip("starlette")
uvicorn = pytest.importorskip("uvicorn")

from servegym.engines.front import Front, Letters  # noqa: E402
from servegym.engines.huggingface import Service, generate, tiny_llama  # noqa: E402

MODEL = tiny_llama()


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    task = with_overrides(load_task("GSM8KPredicted-v0"), {"cluster": {"clients": 2}})
    twin = Twin(task, make_policy("hybrid"), capacity=50)
    with Service(MODEL, twin, kv_tokens=8192, batch_tokens=256) as service:
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
    name = str(len(service.asked) - 1)
    until = time.perf_counter() + 30
    while name not in service.cancelled and time.perf_counter() < until:
        time.sleep(0.02)
    completion(url, prompt=[1], max_tokens=1)  # an iteration later it has gone
    log = service.twin.records()
    assert 0 < log.decode_rounds[int(name)] < 1999
    assert np.isfinite(log.finished_s[int(name)])


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
