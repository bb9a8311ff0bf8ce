"""Engines by hand: a manager of transformers with our scheduler, advanced one iteration at a time."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from inspect import signature
from operator import index
from typing import Any, Final, Literal, get_args

import torch
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from servegym.engines.huggingface.scheduler import Asked, Clock, TwinScheduler
from servegym.engines.iterations import Iteration
from servegym.engines.told import checked_request
from servegym.engines.twin import Twin
from servegym.envs.arguments import whole_number
from servegym.envs.errors import ServegymError, shown, unknown
from servegym.envs.workload.requests import MAX_ARRIVAL_S

PAGE_TOKENS: Final = 16
"""Tokens of a page of KV memory."""

# Errors of the engine's thread reach the caller as exceptions, its notes nobody.
logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL + 1)

_TAKEN: Final = frozenset(signature(ContinuousBatchingConfig).parameters)
"""Names differ within the versions that work here."""


class Driven:
    """What engine and service share: a manager of the library with our scheduler, and its requests."""

    _count = 0

    def __init__(
        self,
        model: Any,
        twin: Twin,
        clock: Clock,
        kv_tokens: int,
        batch_tokens: int,
        *,
        lasting: bool = False,
    ) -> None:
        pages = -(-whole_number("kv_tokens", kv_tokens, 1, 2**40) // PAGE_TOKENS)
        batch_tokens = whole_number("batch_tokens", batch_tokens, 1, 2**24)
        clients = twin.task.cluster.clients
        if batch_tokens < clients:
            raise ServegymError(
                f"batch_tokens must be at least the {clients} clients, got {batch_tokens}"
            )
        if clock not in get_args(Clock):
            raise unknown("clock", str(clock), get_args(Clock))
        if twin.submitted:
            raise ServegymError(
                f"an engine needs a new twin, this one has had {twin.submitted} requests"
            )
        self.twin, self.model, self.pages = twin, model, pages
        self.asked: dict[str, Asked] = {}
        self._schedulers: list[TwinScheduler] = []  # that the library has made
        self._batch_tokens = batch_tokens
        self._context = int(getattr(model.config, "max_position_embeddings", 2**31))
        self._names = itertools.count()
        self._largest: list[int] = []  # pages of the largest requests, as many as there are clients
        self._needs = f"KV memory of {kv_tokens} tokens with batches of {batch_tokens}"

        def scheduler(**given: Any) -> TwinScheduler:
            self._schedulers.append(
                TwinScheduler(twin, self.asked, clock, lasting=lasting, **given)
            )
            return self._schedulers[-1]

        Driven._count += 1
        self._name = f"servegym-{Driven._count}"
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
            If it exceeds the model's context or a batch, memory might not hold as many as may run, or the
            twin would not take it.
        """
        self._check_room()
        asked = self.check_request(prompt, most_tokens, expected_tokens, spread, arrival_s, ends)
        self._reserve(-(-(len(asked.prompt) + asked.most_tokens) // PAGE_TOKENS))
        name = str(next(self._names))
        self.asked[name] = asked
        self.manager.add_request(
            list(asked.prompt),
            request_id=name,
            max_new_tokens=asked.most_tokens,
            eos_token_id=list(asked.ends) or -1,
        )
        return name

    def check_request(
        self,
        prompt: Sequence[int],
        most_tokens: int,
        expected_tokens: int | None = None,
        spread: float = 0.0,
        arrival_s: float | None = None,
        ends: Sequence[int] = (),
    ) -> Asked:
        """Return a request as ``ask`` would take it; refuse what it would, but for room and memory."""
        prompt, ends = self._token_ids("a prompt", prompt), self._token_ids("ends", ends)
        if not prompt:
            raise ServegymError("a prompt holds at least one token id, got none")
        expected = most_tokens if expected_tokens is None else expected_tokens
        _, expected, spread, most = checked_request(
            self.twin.task, len(prompt), expected, spread, most_tokens
        )
        if arrival_s is not None and not 0 <= arrival_s <= MAX_ARRIVAL_S:
            raise ServegymError(f"arrival_s must lie in 0 … {MAX_ARRIVAL_S:g}, got {arrival_s:g}")
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
        return Asked(prompt, most, expected, spread, arrival_s, ends)

    def _check_room(self) -> None:
        """Refuse one more request than the twin can hold."""
        self.twin.check_room(len(self.asked))

    def _token_ids(self, what: str, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return token ids; refuse what is not in the model's vocabulary."""
        vocabulary = int(self.model.config.vocab_size)
        try:
            found = tuple(map(index, tokens))
        except TypeError:
            found = (-1,)
        if found and not 0 <= min(found) <= max(found) < vocabulary:
            raise ServegymError(f"{what} must hold token ids 0 … {vocabulary - 1}")
        return found

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
        if not self._schedulers or processor.scheduler is not self._schedulers[0]:
            raise ServegymError(
                "transformers has not taken the twin's scheduler but "
                f"{type(processor.scheduler).__name__}"
            )
        if processor.use_async_batching:
            raise ServegymError("batches in flight part the twin from the engine")
        return self._schedulers[0]


class Engine(Driven):
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
        try:
            self._processor = self.manager._create_batch_processor()
        except MemoryError:
            raise ServegymError(f"this machine has no room for {self._needs}") from None
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
        return self.scheduler.tokens()
