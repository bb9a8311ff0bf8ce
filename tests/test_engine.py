"""A real engine beside the simulator: the same iterations, and the tokens of plain generation."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.baselines.registry import make_policy
from servegym.engines.iterations import first_difference, next_in_lockstep, simulate
from servegym.engines.twin import Twin
from servegym.envs import Requests, ServegymError, TaskConfig, load_task
from servegym.envs.task.config import with_overrides
from servegym.studies.policies import make_policy as make_any_policy

pytest.importorskip("transformers")

from servegym.engines.huggingface import (
    Engine,
    Service,
    driving,
    generate,
    installed,
    load_model,
    tiny_llama,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CLIENTS, COUNT = 4, 12
MEMORY: dict[str, Any] = {"kv_tokens": CLIENTS * 64, "batch_tokens": CLIENTS * 32}


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_llama()
    gc.freeze()  # an engine that ends collects garbage: half a second, if it looks at all that is loaded
    return model


def task(name: str = "GSM8K-v0", **overrides: Any) -> TaskConfig:
    return with_overrides(load_task(name), {"cluster": {"clients": CLIENTS}} | overrides)


def make_requests(*, arriving: bool = False, predicted: bool = False) -> Requests:
    rng = np.random.default_rng(3)
    outputs = rng.integers(3, 25, COUNT)
    return Requests(
        np.cumsum(rng.exponential(0.1, COUNT)) if arriving else np.zeros(COUNT),
        rng.integers(5, 31, COUNT),
        outputs,
        np.maximum(outputs + rng.integers(-4, 9, COUNT), 1) if predicted else outputs,
        np.full(COUNT, 0.5) if predicted else None,
    )


def prompts(requests: Requests) -> list[list[int]]:
    rng = np.random.default_rng(4)
    return [rng.integers(1, 1000, count).tolist() for count in requests.prompt_tokens]


def loaded(model: Any, twin: Twin, requests: Requests, **given: Any) -> Engine:
    engine = Engine(model, twin, **MEMORY, **given)
    known = twin.task.information.output_lengths == "known"
    for i, prompt in enumerate(prompts(requests)):
        most = int(requests.output_tokens[i])
        expected, spread = (most, 0.0) if known else (int(requests.predicted_output_tokens[i]), 0.5)
        engine.add(prompt, most, expected, spread, arrival_s=float(requests.arrival_s[i]))
    return engine


def run(engine: Engine) -> Engine:
    while engine.step() is not None:
        pass
    return engine


def test_engine_and_simulator_run_the_same_iterations_and_tokens_are_those_of_generate(
    model: Any,
) -> None:
    requests, first = make_requests(), None
    for name in ("fcfs", "threshold-2", "lookahead", "aligned", "hybrid", "offline-steal", "ppo"):
        policies = [make_any_policy(name, "GSM8K-v0") for _ in range(2)]
        engine = run(loaded(model, Twin(task(), policies[0]), requests))
        iterations, twin = simulate(task(), policies[1], requests)
        assert first_difference(engine.iterations, iterations) is None, name
        assert engine.twin.clock_s == twin.clock_s
        first = first or engine.tokens()
        assert engine.tokens() == first
    assert first is not None
    for i, prompt in enumerate(prompts(requests)):
        assert first[i] == generate(model, prompt, int(requests.output_tokens[i]))


@pytest.mark.parametrize("name", ["hybrid", "quantile"])
def test_so_they_do_with_predictions_and_arrivals(model: Any, name: str) -> None:
    requests = make_requests(arriving=True, predicted=True)
    predicted = task("GSM8KPredicted-v0")
    engine = run(loaded(model, Twin(predicted, make_policy(name)), requests))
    iterations, twin = simulate(predicted, make_policy(name), requests)
    assert first_difference(engine.iterations, iterations) is None
    assert engine.twin.records().finished_s.tolist() == twin.records().finished_s.tolist()


def test_measured_seconds_are_the_clock(model: Any) -> None:
    engine = run(loaded(model, Twin(task(), make_policy("fcfs")), make_requests(), clock="busy"))
    assert engine.twin.clock_s == pytest.approx(sum(each.wall_s for each in engine.iterations))
    assert all(each.cpu_s > 0 and each.twin_s > 0 for each in engine.iterations)


def test_lockstep_advances_whoever_has_done_least(model: Any) -> None:
    names = ("fcfs", "hybrid")
    engines = {n: loaded(model, Twin(task(), make_policy(n)), make_requests()) for n in names}
    shares = {0.0}
    while min(engine.share_done for engine in engines.values()) < 1:
        next_in_lockstep(engines)
        shares.add(abs(engines["fcfs"].share_done - engines["hybrid"].share_done))
    assert max(shares) < 0.1


@pytest.mark.parametrize("request_", [0, 11], ids=["running", "waiting"])
def test_a_cancelled_request_is_not_run_any_more(model: Any, request_: int) -> None:
    engine = loaded(model, Twin(task(), make_policy("fcfs")), make_requests())
    for _ in range(2):
        engine.step()
    engine.cancel(request_)
    before = len(engine.iterations)
    run(engine)
    assert all(request_ not in each.ids for each in engine.iterations[before:])
    lengths = {i: len(tokens) for i, tokens in engine.tokens().items() if i != request_}
    outputs = make_requests().output_tokens
    assert lengths == {i: outputs[i] for i in lengths}


def test_a_request_that_is_still_to_come_can_be_cancelled(model: Any) -> None:
    engine = loaded(model, Twin(task(), make_policy("fcfs")), make_requests(arriving=True))
    engine.cancel(10)  # the engine has seen nobody yet
    engine.step()
    engine.cancel(11)
    run(engine)
    assert not {10, 11} & {i for each in engine.iterations for i in each.ids}


def test_in_service_texts_end_as_they_do_and_requests_come_and_go(model: Any) -> None:
    ends = list(range(1, 60))
    twin = Twin(task("GSM8KPredicted-v0"), make_policy("hybrid"))
    given = prompts(make_requests())
    with Service(model, twin, **MEMORY) as service:
        for prompt in given:
            service.submit(prompt, 30, 15, 0.8, ends=ends)
            service.wait(0.01)
        service.cancel("11")
        until = time.perf_counter() + 60
        while len(service.answers.keys() | {"11"}) < COUNT and time.perf_counter() < until:
            service.wait(0.05)
    rounds = twin.records().decode_rounds
    for i, prompt in enumerate(given[:11]):
        assert service.answers[str(i)] == generate(model, prompt, 30, ends)
        assert rounds[i] + 1 == len(service.answers[str(i)])
    assert twin.work() is None


def test_a_service_that_is_interrupted_ends_cleanly_with_its_records(model: Any) -> None:
    twin = Twin(task("GSM8KPredicted-v0"), make_policy("fcfs"))
    service = Service(model, twin, **MEMORY)

    def serve_until_interrupted() -> None:
        with service:
            for prompt in prompts(make_requests()):
                service.submit(prompt, 30, 15, 0.8)
            service.wait(0.02)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serve_until_interrupted()
    assert not service.manager.is_running()
    log = twin.records()
    assert len(log.decode_rounds) == COUNT
    assert (np.isfinite(log.finished_s) | (log.decode_rounds == -1)).all()
    assert twin.work() is None


# ---- bad input, and its legal twin --------------------------------------------------------------


def new_engine(model: Any, **given: Any) -> Engine:
    return Engine(model, Twin(task(), make_policy("fcfs"), capacity=5), **(MEMORY | given))


def test_a_prompt_longer_than_the_context_is_refused(model: Any) -> None:
    engine = new_engine(model, kv_tokens=4 * 4096, batch_tokens=64)
    with pytest.raises(ServegymError, match=r"5 tokens and 4092 more exceed .* context of 4096"):
        engine.add([1] * 5, 4092)
    assert engine.add([1] * 5, 4091) == 0


def test_a_prompt_larger_than_a_batch_is_refused(model: Any) -> None:
    with pytest.raises(
        ServegymError, match="129 tokens exceeds a batch of 128; raise batch_tokens"
    ):
        new_engine(model).add([1] * 129, 1)
    assert new_engine(model).add([1] * 128, 1) == 0


def test_more_than_memory_holds_is_refused(model: Any) -> None:
    engine = new_engine(model, kv_tokens=160)
    assert [engine.add([1] * 20, 20) for _ in range(3)] == [0, 1, 2]  # 48 tokens in pages each
    with pytest.raises(
        ServegymError, match="4 requests may hold 192 tokens, KV memory has 160; raise"
    ):
        engine.add([1] * 20, 20)
    assert engine.add([1] * 10, 6) == 3


def test_a_stage_that_would_be_split_is_refused(model: Any) -> None:
    engine = new_engine(model, batch_tokens=32)
    for _ in range(2):
        engine.add([1] * 20, 2)
    with pytest.raises(
        ServegymError, match="takes 32 of 40 tokens of a prefill of 2 requests; raise"
    ):
        engine.step()


@pytest.mark.parametrize("prompt", [[], [1000], [-1], [1.5], "ab", None])
def test_what_is_no_prompt_is_refused(model: Any, prompt: list[int]) -> None:
    with pytest.raises(ServegymError, match=r"must hold token ids 0 … 999|at least one token id"):
        new_engine(model).add(prompt, 1)
    assert new_engine(model).add(list(np.array([0, 999])), 1) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"expected_tokens": 0}, "expected_output_tokens must lie in 1 … 10000000, got 0"),
        ({"expected_tokens": float("nan")}, "must be a whole number, got nan"),
        ({"spread": 0.5}, "spread must be 0, got 0.5: lengths are known"),
        ({"arrival_s": -1.0}, "arrival_s must lie in 0 … 1e\\+09, got -1"),
        ({"ends": ["a"]}, "ends must hold token ids 0 … 999"),
    ],
)
def test_what_the_twin_would_not_take_is_refused_before_the_engine_has_it(
    model: Any, given: dict[str, Any], message: str
) -> None:
    engine = new_engine(model)
    with pytest.raises(ServegymError, match=message):
        engine.add([1], 1, **given)
    assert engine.step() is None  # as if it had never been asked


def test_one_request_more_than_the_twin_has_room_for_is_refused(model: Any) -> None:
    engine = new_engine(model)
    assert [engine.add([1], 1) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ServegymError, match="the twin holds 5 requests, which is its capacity"):
        engine.add([1], 1)
    assert len(run(engine).iterations) == 2


def test_a_request_that_claims_to_come_before_the_last_one_comes_with_it(model: Any) -> None:
    engine = new_engine(model)
    for arrival_s in (1.0, 0.5):
        engine.add([1], 1, arrival_s=arrival_s)
    run(engine)
    assert engine.twin.records().arrival_s.tolist() == [1.0, 1.0]


def test_an_engine_needs_a_new_twin_and_a_clock_that_there_is(model: Any) -> None:
    engine = new_engine(model)
    engine.add([1], 1)
    run(engine)
    with pytest.raises(ServegymError, match="needs a new twin, this one has had 1 requests"):
        Engine(model, engine.twin, **MEMORY)
    with pytest.raises(ServegymError, match="unknown clock 'buzy'; did you mean 'busy'"):
        new_engine(model, clock="buzy")


def test_more_memory_than_the_machine_has_is_refused(model: Any) -> None:
    with pytest.raises(ServegymError, match="no room for KV memory of 1099511627776 tokens"):
        new_engine(model, kv_tokens=2**40)


def test_whoever_has_not_ended_has_its_own_most_tokens_in_the_records(model: Any) -> None:
    engine = new_engine(model)
    engine.add([1], 7)
    engine.step()
    assert engine.twin.records().decode_rounds.tolist() == [6]


def test_a_service_that_is_interrupted_at_its_start_leaves_no_thread(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service(model, Twin(task(), make_policy("fcfs")), **MEMORY)

    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(service, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt), service:
        pass
    assert not service.started
    assert not service.manager.is_running()


def test_fewer_tokens_in_a_batch_than_clients_are_refused(model: Any) -> None:
    with pytest.raises(ServegymError, match="batch_tokens must be at least the 4 clients, got 3"):
        new_engine(model, batch_tokens=3)


def test_a_scheduler_that_the_library_has_chosen_is_refused(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Forgets(dict[str, Any]):
        def __setitem__(self, key: str, value: Any) -> None:
            pass

    import transformers.generation.continuous_batching.scheduler as library

    monkeypatch.setattr(driving, "SCHEDULER_MAPPING", Forgets(library.SCHEDULER_MAPPING))
    with pytest.raises(ServegymError, match="has not taken the twin's scheduler but FIFOScheduler"):
        new_engine(model)


def test_a_model_that_is_not_there_is_refused(tmp_path: Path, model: Any) -> None:
    with pytest.raises(
        ServegymError, match=r"nowhere: no such folder; others are tiny and smollm2"
    ):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ServegymError, match=r"holds no config\.json of a model"):
        load_model(str(tmp_path))
    model.save_pretrained(tmp_path)
    with pytest.raises(ServegymError, match=r"holds no tokenizer, such as tokenizer\.json"):
        load_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ServegymError, match="no tokenizer that can be read"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("found", "legal"), [("5.16.9", False), ("5.17.0", True), ("5.24.9", True), ("5.25.0", False)]
)
def test_versions_outside_the_range_are_refused(
    monkeypatch: pytest.MonkeyPatch, found: str, legal: bool
) -> None:
    monkeypatch.setattr(installed, "version", lambda _: found)
    if legal:
        assert installed.check_installed() == found
        return
    with pytest.raises(
        ServegymError, match=rf"transformers is {found}, the engine needs .*>=5\.17,<5\.25"
    ):
        installed.check_installed()
