"""Offline plans of policies: each makes a plan from what a policy is told before an episode."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from servegym.baselines.planning.planner import rebalanced_plan
from servegym.baselines.planning.sampled import plan_by_samples, sample_rounds
from servegym.envs.playing.policy import Briefing
from servegym.envs.task.lowering import lay_out
from servegym.envs.workload.comparison import standard_deviations
from servegym.envs.workload.plan import Plan, plan_from_queues
from servegym.envs.workload.requests import MAX_TOKENS, Requests

Planner = Callable[[Requests, Briefing], Plan]
"""Plans the requests that are present at t = 0."""


def plan_expected(requests: Requests, briefing: Briefing) -> Plan:
    """Make the largest load as small as can be, by expected lengths (paper, section IV.B)."""
    # By moves, not by the clock: the same episode on every machine.
    return _plan(requests.decode_rounds, requests, briefing)


def plan_at_risk(requests: Requests, briefing: Briefing, deviations: float) -> Plan:
    """Plan by lengths that lie some standard deviations above their means."""
    longer = deviations * standard_deviations(requests)
    rounds = requests.decode_rounds + np.rint(np.minimum(longer, MAX_TOKENS)).astype(np.int64)
    rounds = np.minimum(rounds, MAX_TOKENS - 1)
    return _plan(rounds, requests, briefing)


def _plan(rounds: NDArray[np.int64], requests: Requests, briefing: Briefing) -> Plan:
    """Plan by these rounds over the clients of all replicas."""
    fleet = lay_out(briefing.task).fleet()
    tokens = requests.prompt_tokens + requests.output_tokens
    return rebalanced_plan(rounds, fleet, tokens=tokens).plan


def plan_sampled(requests: Requests, briefing: Briefing, scenarios: int) -> Plan:
    """Plan for a small mean, over sampled scenarios, of the largest load (``planning.sampled``)."""
    fleet, rng = lay_out(briefing.task).fleet(), briefing.rng
    rounds = sample_rounds(requests, scenarios, rng)
    return plan_by_samples(requests, fleet, rounds, rng).plan


def deal_in_turn(requests: Requests, briefing: Briefing) -> Plan:
    """Deal the requests to the clients in turn, in order of arrival: nothing is predicted."""
    clients = briefing.task.cluster.all_clients
    return plan_from_queues([range(client, len(requests), clients) for client in range(clients)])
