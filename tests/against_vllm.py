"""vLLM's CPU build as an engine: a small model in a folder, served under a twin."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from servegym.engines.iterations import expectation
from servegym.envs.playing.policy import Policy
from servegym.envs.task.config import TaskConfig
from servegym.studies.engines.equality import Run, Serve
from servegym.studies.engines.loads import Load

# Read when vLLM is imported: the engine in this process, a small memory, no network.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def by_vllm(model: Any, folder: Path) -> Serve:
    """What serves by vLLM; the model is saved in a folder first."""
    from vllm import LLM, SamplingParams

    from servegym.engines.vllm import beside_numba, twin_scheduler

    model.save_pretrained(folder)

    def serve(load: Load, task: TaskConfig, policy: Policy, seed: int) -> Run:
        twin, requests = load.twin(task, policy, seed), load.requests

        def expected(request: Any) -> tuple[int, float]:
            return expectation(task, requests, len(scheduler.made.known))

        scheduler = twin_scheduler(twin, expected)
        with beside_numba():
            llm = LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                enforce_eager=True,
                dtype="float32",
                max_model_len=256,
                max_num_seqs=task.cluster.clients,
                max_num_batched_tokens=max(256, load.memory(task)["batch_tokens"]),
                scheduler_cls=scheduler,
                async_scheduling=False,
                enable_prefix_caching=False,
                enable_chunked_prefill=False,
                disable_log_stats=True,
                seed=0,
            )
        ends = list(load.ends)
        wanted = [
            SamplingParams(
                temperature=0.0,
                max_tokens=int(most),
                stop_token_ids=ends,
                ignore_eos=True,
                detokenize=False,
            )
            for most in requests.output_tokens
        ]
        prompts: Any = [{"prompt_token_ids": list(prompt)} for prompt in load.prompts]
        answers = llm.generate(prompts, wanted, use_tqdm=False)
        tokens = {i: list(answer.outputs[0].token_ids) for i, answer in enumerate(answers)}
        return Run(scheduler.made.iterations, tokens, twin)

    return serve
