"""The explicit list of baseline policies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from servegym.baselines.calendar.fitted import calendar_policy
from servegym.baselines.lookahead.rollout import RolloutPolicy
from servegym.baselines.parameters import by_deviations, by_quantile
from servegym.baselines.rules import published, triggers
from servegym.baselines.rules.limited import LimitedPolicy
from servegym.baselines.rules.plans import deal_in_turn, plan_at_risk, plan_expected, plan_sampled
from servegym.baselines.rules.policies import RandomPolicy, TriggerPolicy
from servegym.baselines.rules.slai import SlaiPolicy
from servegym.envs.playing.policy import Policy

ANY_PROMPTS: Final = 10**12
"""A token budget of mixed stages that cuts no prompt."""


@dataclass(frozen=True)
class Entry:
    """A policy's one-line description and a prototype, copied for every use."""

    description: str
    prototype: Policy
    parameter: str = ""
    """Key in ``PARAMETERS`` of the number that its name may carry; empty: none."""
    required: bool = False
    """Whether the name is no policy without that number."""
    more: tuple[str, ...] = ()
    """Keys of further numbers, which only the long form of the name carries."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of all numbers that its name may carry."""
        return (self.parameter, *self.more) if self.parameter else ()


def _eager(**cluster: Any) -> TriggerPolicy:
    """Return prefill in order of arrival as soon as a client is idle, with keys of ``[cluster]``."""
    return TriggerPolicy("fcfs", triggers.EAGER, cluster=cluster)


def _mixed(steals: tuple[str, ...] | None = None, **cluster: Any) -> TriggerPolicy:
    """Return the same in mixed stages, stealing what is named; None: whatever the task lets it."""
    return TriggerPolicy("fcfs", triggers.EAGER, mixed=True, cluster=cluster, steals=steals)


REGISTRY: Final[dict[str, Entry]] = {
    "random": Entry("a legal action, uniformly", RandomPolicy()),
    "fcfs": Entry(
        "prefill as soon as a client is idle, in order of arrival (the paper's baseline, vLLM's "
        "classic rule)",
        _eager(),
    ),
    "vllm-classic": Entry("fcfs under the name of its engine", _eager()),
    "vllm": Entry(
        "vLLM V1: in mixed stages, running requests first, then in order of arrival (the task sets "
        "cluster.chunk_tokens; vLLM's is 8192)",
        _mixed(),
    ),
    "sarathi": Entry(
        "Sarathi-Serve: the same rule, published with smaller budgets (chunk_tokens 512 or 2048)",
        _mixed(),
    ),
    "trt-no-evict": Entry(
        "TensorRT-LLM's default: the same, admitting only what fits with all outputs at full length",
        _mixed(admission_guard="full"),
    ),
    "orca": Entry(
        "Orca: every pass takes new requests, prompts whole, if they fit with all outputs at full length "
        "(its budget replaces cluster.chunk_tokens, which the task must set)",
        _mixed(admission_guard="full", chunk_tokens=ANY_PROMPTS),
    ),
    "sglang": Entry(
        "SGLang: prefill what fits beside a share of all outputs to come, in order of arrival, else "
        "decode; c is its schedule_conservativeness (1; the task sets cluster.chunk_tokens, SGLang's is "
        "8192, and max_prefill_tokens, 16384)",
        _eager(admission_guard="sglang", conservativeness=1.0, preempt="fewest-output"),
        parameter="conservativeness",
    ),
    "trt-max-util": Entry(
        "TensorRT-LLM's MAX_UTILIZATION: the same as vllm without a guard, the last admitted gives way "
        "(the task sets cluster.chunk_tokens; a watermark of 0 is TensorRT-LLM's)",
        _mixed(admission_guard="none", preempt="newest"),
    ),
    "sjf": Entry(
        "shortest expected output first, prefill as soon as a client is idle; who has waited N seconds "
        "(60) goes before all shorter ones",
        published.sjf(),
        parameter="patience",
    ),
    "mc-sf": Entry(
        "MC-SF (arXiv 2502.07115): shortest expected output first while memory holds all who run at "
        "every expected finish, up to the first that does not fit",
        published.mc_sf(),
    ),
    "a-max": Entry(
        "A_max (arXiv 2508.14544): as mc-sf by the upper end of the interval where a length lies with "
        "probability q (0.9)",
        published.a_max(),
        parameter="interval",
    ),
    "a-min": Entry(
        "A_min (arXiv 2508.14544): as mc-sf by the lower end, or by the tokens emitted once they are more; "
        "where memory is full the smallest lower bound gives way (q 0.9)",
        published.a_min(),
        parameter="interval",
    ),
    "sorted-f": Entry(
        "Sorted-F (arXiv 2508.06133): in batches of the least Σ output / size², packed as mc-sf packs",
        published.sorted_f(),
    ),
    "slai": Entry(
        "SLAI (arXiv 2508.01002): prefill, shortest prompt first, as long as nobody waits more than G "
        "seconds for a token (slo.tpot_s), else a mixed stage or decode (asked at every round)",
        SlaiPolicy(),
        parameter="gap",
    ),
    "mlfq": Entry(
        "feedback queues as FastServe's (arXiv 2305.05920), without stopping who runs: fewest doublings of Q "
        "tokens (256) that prompt and output so far take go first, and last out; after 60 s before all",
        published.mlfq(),
        parameter="level",
    ),
    "edf": Entry(
        "earliest deadline first: arrival plus slo.ttft_s of its class",
        published.edf(),
    ),
    "no-steal": Entry(
        "vllm that steals nothing, whatever the task lets it",
        _mixed(steals=()),
    ),
    # Two rules as users report them: SGLang moves what waits only, ROLL then the shortest that run.
    "steal-half": Entry(
        "vllm; a replica with more idle clients than requests of its own waiting steals half of what waits "
        "more in the fullest queue (rounded up: from 1 on; SGLang #37401), then of what runs where most do, "
        "if 2 more, the fewest tokens first until even, at most every N seconds (3; ROLL #134)",
        _mixed(steal_share="half", migrate="shortest", steal_period_s=3.0),
        parameter="period",
    ),
    "llumnix": Entry(
        "vllm; every N seconds (0.05) the replica of k-th least free memory gives the request of fewest "
        "tokens to that of k-th most, live, if it has less than S free blocks a request (3) or preempts, the "
        "other more: Llumnix's migration and defaults (OSDI 2024); steals no waiting ones",
        _mixed(("running",), migrate="freeness", steal_period_s=0.05, freeness_steps=3.0),
        parameter="period",
        more=("steps",),
    ),
    "shed": Entry(
        "vllm that turns away who waits and cannot have its first token within x times slo.ttft_s any more "
        "(1), as Mooncake refuses who would come too late (arXiv 2407.00079)",
        _mixed(shed_at=1.0),
        parameter="share",
    ),
    "static": Entry(
        "decode until all clients are idle, then refill them in order of arrival",
        TriggerPolicy("fcfs", triggers.DRAINED),
    ),
    "offline": Entry(
        "offline plan, each client its own queue, prefill as soon as one is idle",
        TriggerPolicy("plan", triggers.EAGER, planner=plan_expected),
    ),
    "offline-steal": Entry(
        "offline plan, an idle client steals the longest request of the busiest one",
        TriggerPolicy("steal", triggers.EAGER, planner=plan_expected),
    ),
    "hybrid": Entry(
        "plan, steal and the Lagrangian prefill-or-decode rule: the paper's method",
        TriggerPolicy("steal", triggers.LAGRANGIAN, 1.0, planner=plan_expected),
        parameter="multiplier",
        more=("memory", "slo"),
    ),
    "hybrid-plan": Entry(
        "the hybrid without stealing: each client its own queue",
        TriggerPolicy("plan", triggers.LAGRANGIAN, 1.0, planner=plan_expected),
        parameter="multiplier",
        more=("memory", "slo"),
    ),
    "hybrid-myopic": Entry(
        "the hybrid with a rule that looks at one decode round only",
        TriggerPolicy("steal", triggers.MYOPIC, 1.0, planner=plan_expected),
        parameter="multiplier",
    ),
    "lpt": Entry(
        "one queue, longest first, Lagrangian rule",
        TriggerPolicy("longest", triggers.LAGRANGIAN, 1.0),
        parameter="multiplier",
        more=("memory", "slo"),
    ),
    # Prices from seeds 0 … 59 of Chat-v0, Cluster-v0 and 0 … 19 of Elastic-v0.
    "lagrangian": Entry(
        "lpt with prices of memory, m times what evictions will cost (1), and of missed limits, s "
        "client-seconds a request (30); see triggers.priced; hybrid takes them, too",
        TriggerPolicy("longest", triggers.LAGRANGIAN, 1.0, memory=1.0, slo=30.0),
        parameter="multiplier",
        more=("memory", "slo"),
    ),
    "threshold": Entry(
        "longest first, prefill when at least K clients are idle",
        TriggerPolicy("longest", triggers.THRESHOLD, 1.0),
        parameter="idle",
        required=True,
    ),
    "lookahead": Entry(
        "longest first, prefill once idling until the next finish costs a stage's fixed part",
        TriggerPolicy("longest", triggers.LOOKAHEAD, 1.0),
        parameter="multiplier",
    ),
    "aligned": Entry(
        "requests that finish together, prefill once the idle time waited reaches a stage's fixed "
        "part (asked at every round)",
        TriggerPolicy("aligned", triggers.WAITED, 1.0, decisions="rounds"),
        parameter="multiplier",
    ),
    "aligned-lookahead": Entry(
        "requests that finish together, prefill when lookahead does",
        TriggerPolicy("aligned", triggers.LOOKAHEAD, 1.0),
        parameter="multiplier",
    ),
    "round-robin": Entry(
        "requests dealt to the clients in turn, each client its own queue, prefill as soon as one is "
        "idle (predicts nothing)",
        TriggerPolicy("plan", triggers.EAGER, planner=deal_in_turn),
    ),
    "feedback": Entry(
        "in order of arrival, prefill when lookahead does if requests go on finishing as often as "
        "they have so far (predicts nothing)",
        TriggerPolicy("fcfs", triggers.FEEDBACK, 1.0),
        parameter="multiplier",
    ),
    "offline-risk": Entry(
        "offline plan by the mean length plus k standard deviations (1), prefill as soon as one is idle",
        TriggerPolicy("plan", triggers.EAGER, planner=partial(plan_at_risk, deviations=1.0)),
        parameter="risk",
    ),
    "offline-saa": Entry(
        "offline plan of the least mean makespan over S sampled scenarios (256), prefill as soon as "
        "one is idle",
        TriggerPolicy("plan", triggers.EAGER, planner=partial(plan_sampled, scenarios=256)),
        parameter="scenarios",
    ),
    # λ from seeds 0 … 29 of GSM8KMixed-v0.
    "quantile": Entry(
        "one queue, the longest by its q-quantile first (0.99), prefill when feedback-0.5 does",
        TriggerPolicy("longest", triggers.FEEDBACK, 0.5, comparison=by_quantile(0.99)),
        parameter="quantile",
    ),
    "mean-sd": Entry(
        "one queue, the longest by its mean plus k standard deviations first (1), prefill when "
        "feedback-0.5 does",
        TriggerPolicy("longest", triggers.FEEDBACK, 0.5, comparison=by_deviations(1.0)),
        parameter="deviations",
    ),
    "fixed-count": Entry(
        "in order of arrival, never more clients than hold the longest prompt with the longest output "
        "each (the paper's fixed number; of process.caps)",
        LimitedPolicy("worst"),
    ),
    "chance-count": Entry(
        "in order of arrival, as many clients as memory holds with chance q (0.99; of process.caps)",
        LimitedPolicy("chance"),
        parameter="chance",
    ),
    "reserve": Entry(
        "in order of arrival, leaving free by what the q-quantile of all that clients hold exceeds its mean "
        "(0.99; of process.reserves)",
        LimitedPolicy("reserve"),
        parameter="chance",
    ),
    "calendar": Entry(
        "stages by a learned calendar, each with the requests that fit it now and would not later; before an "
        "episode N calendars are played in imagination (30), each a change of the best so far",
        calendar_policy(),
        parameter="calendars",
    ),
    # λ from 30 cases of GSM8K-v0, N for 5 ms a decision there; both on training seeds.
    "rollout": Entry(
        "finish the episode in imagination once per action and for N changes of the best schedule "
        "so far (6), BASE deciding (aligned-lookahead-0.7), and take the best; BASE may be an agent; with "
        "samples=S, where lengths are not known, play S sampled futures an action by a rule BASE "
        "(threshold-12), whose own action stands unless another gains E standard errors (3)",
        RolloutPolicy(TriggerPolicy("aligned", triggers.LOOKAHEAD, 0.7), variations=6),
        parameter="variations",
        more=("samples", "errors"),
    ),
}
"""Policies by name."""

BASED: Final = tuple(
    name for name, entry in REGISTRY.items() if isinstance(entry.prototype, RolloutPolicy)
)
"""Names of the policies that improve on a base."""

MIXED: Final = tuple(
    name
    for name, entry in REGISTRY.items()
    if isinstance(entry.prototype, TriggerPolicy) and entry.prototype.mixed
)
"""Names of the policies that need mixed stages: tasks with ``cluster.chunk_tokens``."""
