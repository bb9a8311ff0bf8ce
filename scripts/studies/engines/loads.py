"""What an engine is to serve: requests with their prompts, and how much memory they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from servegym.engines.iterations import expectation
from servegym.engines.twin import Twin
from servegym.envs.errors import ServegymError
from servegym.envs.files import read_text
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.policy import Policy
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.task.registered import load_task
from servegym.envs.workload.cells import is_file
from servegym.envs.workload.requests import Requests, make_requests
from servegym.studies.policies import SHIPPED, make_policy

if TYPE_CHECKING:
    from servegym.engines.huggingface import Engine

PAGE = 16  # tokens; a request may waste a page

QUESTIONS = (
    "What is 12 plus 30?",
    "Name three colours.",
    "Who wrote Hamlet?",
    "What is the capital of France?",
    "Say hello.",
    "How many legs has a spider?",
    "Translate 'cat' into French.",
    "Is water wet?",
    "Write a short poem about rain.",
    "Explain in two sentences why the sky is blue.",
    "List five animals that live in the sea.",
    "How do I boil an egg?",
)


@dataclass(frozen=True, eq=False)
class Load:
    """Requests and what an engine needs besides: token ids, and which of them end a text."""

    requests: Requests
    """Their output tokens are the most that each may have; exact where nothing ends a text."""
    prompts: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...] = ()

    def memory(self, task: TaskConfig) -> dict[str, int]:
        """Return ``kv_tokens`` and ``batch_tokens`` with which nothing is preempted or split."""
        clients, requests = task.cluster.clients, self.requests
        held = requests.prompt_tokens + requests.output_tokens + PAGE
        batch = int(np.sort(requests.prompt_tokens)[-clients:].sum())
        if task.cluster.max_prefill_tokens > 0:
            longest = int(requests.prompt_tokens.max())
            batch = min(batch, max(task.cluster.max_prefill_tokens, longest))
        return {
            "kv_tokens": int(np.sort(held)[-clients:].sum()),
            "batch_tokens": max(batch, clients),
        }

    def twin(self, task: TaskConfig, policy: Policy, seed: int = 0) -> Twin:
        """Return a new twin with room for all requests."""
        return Twin(task, policy, capacity=len(self.requests), seed=seed)

    def engine(
        self,
        model: Any,
        task: TaskConfig,
        policy: Policy,
        clock: Literal["model", "busy"] = "model",
        seed: int = 0,
        memory: Mapping[str, int] | None = None,
    ) -> Engine:
        """Return an engine that has been given all requests; without ``memory``, with what they need."""
        from servegym.engines.huggingface import Engine

        twin = self.twin(task, policy, seed)
        engine = Engine(model, twin, clock=clock, **(memory or self.memory(task)))
        for i, prompt in enumerate(self.prompts):
            engine.add(
                prompt,
                int(self.requests.output_tokens[i]),
                *expectation(task, self.requests, i),
                arrival_s=float(self.requests.arrival_s[i]),
                ends=self.ends,
            )
        return engine

    def revealed(self, tokens: dict[int, list[int]]) -> Requests:
        """Return the requests with the lengths that an engine has found; 1 where it has not seen them."""
        lengths = [max(len(tokens.get(i, ())), 1) for i in range(len(self.requests))]
        return replace(self.requests, output_tokens=np.array(lengths))


def random_prompts(requests: Requests, vocabulary: int, seed: int) -> Load:
    """Return prompts of random token ids; nothing ends a text before its last token."""
    rng = np.random.default_rng([seed, 2])
    prompts = (rng.integers(1, vocabulary, int(n)).tolist() for n in requests.prompt_tokens)
    return Load(requests, tuple(map(tuple, prompts)))


def task_load(task: TaskConfig, vocabulary: int, seed: int) -> Load:
    """Return a case of the task's workload with random prompts."""
    return random_prompts(make_case(task, seed).requests, vocabulary, seed)


def uniform_load(
    count: int, vocabulary: int, seed: int, prompts: tuple[int, int], outputs: tuple[int, int]
) -> Load:
    """Return requests that are all present, prompt and output tokens uniform in two ranges."""
    rng = np.random.default_rng(seed)
    lengths = [rng.integers(low, high + 1, count) for low, high in (prompts, outputs)]
    return random_prompts(make_requests(*lengths), vocabulary, seed)


def check_unknown(task: TaskConfig) -> None:
    """Refuse a task that knows the lengths of texts which end by themselves."""
    if task.information.output_lengths == "known":
        raise ServegymError(
            f"{task.name} knows output lengths, and a model that ends its texts itself tells nobody; "
            "take --task GSM8KPredicted-v0"
        )


def text_load(
    texts: Sequence[str], tokenizer: Any, model: Any, task: TaskConfig, most_tokens: int, seed: int
) -> Load:
    """Return texts as prompts, in the model's form of a chat if it has one; the model ends its answers.

    Nobody predicts their lengths: all are expected at half the most, give or take a factor of two.
    """
    check_unknown(task)
    count = task.workload.requests
    drawn = make_case(task, seed).requests
    asked = [texts[i % len(texts)] for i in range(min(count, len(drawn)))]
    prompts = [tuple(_token_ids(tokenizer, text)) for text in asked]
    n = len(prompts)
    requests = Requests(
        drawn.arrival_s[:n],
        np.array([len(prompt) for prompt in prompts]),
        np.full(n, most_tokens),
        np.full(n, max(1, most_tokens // 2)),
        np.full(n, 0.7),
    )
    return Load(requests, tuple(prompts), ends_of(tokenizer, model))


def ends_of(tokenizer: Any, model: Any) -> tuple[int, ...]:
    """Return the token ids that end a model's text."""
    found = {tokenizer.eos_token_id}
    configured = getattr(model.generation_config, "eos_token_id", None)
    found |= set(configured if isinstance(configured, list) else [configured])
    if "<|im_end|>" in tokenizer.get_vocab():
        found.add(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    return tuple(sorted(int(token) for token in found if token is not None))


def _token_ids(tokenizer: Any, text: str) -> list[int]:
    if "<|im_end|>" in tokenizer.get_vocab():
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    return [int(token) for token in tokenizer(text).input_ids]


def read_texts(path: Path) -> list[str]:
    """Read prompts from a text file, one a line."""
    texts = [line.strip() for line in read_text(path, "file of prompts").splitlines()]
    texts = [text for text in texts if text]
    if not texts:
        raise ServegymError(f"{path}: holds no prompt; one a line")
    return texts


def engine_task(
    name: str, clients: int, requests: int, *, workload: str = "", rate: float = 0.0
) -> TaskConfig:
    """Return a task for so many slots of an engine, with so many requests."""
    task = load_task(name)
    changes: dict[str, Any] = {"cluster": {"clients": clients}}
    if workload:
        changes["workload"] = {"source": workload}
    elif not is_file(task.workload.source):
        changes["workload"] = {"requests": requests}
        if rate > 0:
            changes["workload"]["arrival_rate_per_s"] = rate
    return with_overrides(task, changes)


def engine_policy(name: str, task: TaskConfig) -> Policy:
    """Return a policy; ``ppo`` is the agent shipped for GSM8K, as lengths are known or predicted."""
    if name != SHIPPED:
        return make_policy(name, task.name)
    known = task.information.output_lengths == "known"
    return make_policy(name, "GSM8K-v0" if known else "GSM8KPredicted-v0")
