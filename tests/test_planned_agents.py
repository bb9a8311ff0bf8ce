"""Agents that follow an offline plan: in training, validation, imitation, files and play."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from servegym.agents.card import CARD_FILE, read_card
from servegym.agents.hyperparameters import default_hyperparameters
from servegym.agents.imitation import imitate
from servegym.agents.network import Network
from servegym.agents.policy import load_agent, save_agent
from servegym.agents.training import make_model
from servegym.agents.validation import Validation
from servegym.baselines.expert import make_rule_expert
from servegym.baselines.registry import make_trigger_policy
from servegym.baselines.rules.compiled import play_compiled
from servegym.envs import ServegymError, ServingVectorEnv, make_case, play
from servegym.envs.playing.evaluation import brief
from servegym.envs.task.cases import Case
from servegym.envs.workload.plan import Plan, plan_from_queues
from servegym.studies.agents.training import make_expert, make_plan_case, make_reference
from servegym.studies.policies import make_policy, planner_of
from tests.helpers import changed
from tests.training_helpers import SMALL, TINY

PLANNED = replace(
    SMALL,
    plan="offline",
    reference="offline",
    imitation_rounds=1,
    imitate="rule",
    expert="offline",
    imitation_states=200,
    imitation_environments=4,
    imitation_batch_size=64,
    imitation_epochs=20,
    imitation_learning_rate=3e-3,
)
TASK = changed(TINY, workload={"requests": 14})
RULE = 1  # the action of the rule `plan`


def reversed_plan(case: Case) -> Plan:
    """Not the greedy one: in order of arrival, the last client first."""
    clients = TASK.cluster.clients
    n = len(case.requests)
    return plan_from_queues([range(clients - 1 - j, n, clients) for j in range(clients)])


def clocks(env: ServingVectorEnv) -> list[float]:
    """When both rows' first episodes end under the plan's rule at once."""
    env.reset(seed=7)
    ends = [0.0, 0.0]
    while not all(ends):
        _, _, ended, _, infos = env.step(np.where(env.action_masks()[:, RULE], RULE, 0))
        for e in np.flatnonzero(ended):
            ends[e] = ends[e] or float(infos["final_info"]["makespan_s"][e])
    return ends


def test_rows_follow_the_plans_they_are_given() -> None:
    env = ServingVectorEnv(2, TASK)
    greedy = clocks(env)
    env.plan_case = reversed_plan
    planned = clocks(env)
    rule = make_trigger_policy("offline")
    for e in range(2):
        case = make_case(TASK, 7 + e)
        own = play_compiled(TASK, rule, case, reversed_plan(case))["makespan_s"]
        assert planned[e] == own
    assert planned != greedy
    env.plan_case = lambda case: None
    assert clocks(env) == greedy


def test_a_plan_that_does_not_fit_is_refused() -> None:
    env = ServingVectorEnv(1, TASK)
    env.plan_case = lambda case: plan_from_queues([[0], [1]])
    with pytest.raises(ServegymError, match="the plan is for 2 clients, the task has 3"):
        env.reset(seed=0)


def test_validation_follows_them_too() -> None:
    validation = Validation(TASK, [3, 4], make_plan_case(PLANNED, TASK))
    episodes = validation.play(lambda _, masks: np.where(masks[:, RULE], RULE, 0)).episodes
    rule = make_trigger_policy("offline")
    for seed, gap in zip([3, 4], episodes["gap"], strict=True):
        assert gap == play_compiled(TASK, rule, make_case(TASK, seed))["gap"]


def test_training_begins_as_the_rule_of_the_plan() -> None:
    plan_case = make_plan_case(PLANNED, TASK)
    reference = make_reference(PLANNED, TASK, plan_case)
    expert = make_expert(PLANNED, TASK)
    assert plan_case is not None
    assert reference is not None
    assert expert is not None
    case = make_case(TASK, 5)
    plan = plan_case(case)
    assert plan is plan_case(case)
    assert plan is not None
    expected = make_trigger_policy("offline").prepare(brief(TASK, case, 0))
    assert expected is not None
    assert plan.order.tolist() == expected.order.tolist()
    assert reference(case) == play_compiled(TASK, make_trigger_policy("offline"), case)["gap"]
    model = make_model(TASK, PLANNED, reference, plan_case)
    imitate(model, TASK, expert, PLANNED, plan_case=plan_case)
    from servegym.agents.export import policy_network

    network = policy_network(model)
    best = Validation(TASK, range(900_000, 900_004), plan_case).play(network.best).episodes["gap"]
    rule = make_trigger_policy("offline")
    gaps = [play_compiled(TASK, rule, make_case(TASK, s))["gap"] for s in range(900_000, 900_004)]
    assert best.mean() <= np.mean(gaps) + 0.03


def test_paper_follows_the_plan_by_default() -> None:
    h = default_hyperparameters("servegym/Paper-v0")
    assert (h.plan, h.expert, h.reference) == ("offline", "offline", "offline")
    assert default_hyperparameters("servegym/GSM8K-v0").plan == ""


def planned_agent(folder: Path, plan: str = "offline") -> None:
    """An agent that prefills by the plan wherever it can."""
    actions = TASK.actions
    weights = np.zeros((len(actions), 65), np.float32)
    biases = np.zeros(len(actions), np.float32)
    biases[[0, RULE]] = 1.0, 2.0
    save_agent(Network([(weights, biases)]), folder, actions, "events", {}, {}, plan=plan)


def test_an_agent_is_planned_for_wherever_it_plays(tmp_path: Path) -> None:
    planned_agent(tmp_path / "agent")
    assert read_card(tmp_path / "agent" / CARD_FILE).plan == "offline"
    for seed in range(3):
        case = make_case(TASK, seed)
        agent = make_policy(str(tmp_path / "agent"), TASK.name)
        row = play(TASK, "agent", agent, case, seed).row
        assert row["gap"] == play_compiled(TASK, make_trigger_policy("offline"), case)["gap"]
    alone = load_agent(tmp_path / "agent")
    with pytest.raises(
        ServegymError, match="follows the offline plans of 'offline': give load_agent"
    ):
        alone.prepare(brief(TASK, make_case(TASK, 0), 0))
    planned_agent(tmp_path / "free", plan="")
    assert load_agent(tmp_path / "free").prepare(brief(TASK, make_case(TASK, 0), 0)) is None


def test_bad_plans(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match="'threshold-2' makes no offline plan; offline, "):
        planner_of("threshold-2")
    with pytest.raises(ServegymError, match="unknown policy 'ofline'; did you mean 'offline'"):
        make_plan_case(replace(PLANNED, plan="ofline"), TASK)
    few = changed(TASK, process={"rules": ["longest"]})
    with pytest.raises(ServegymError, match=r"admits by 'plan', which process\.rules"):
        make_plan_case(PLANNED, few)
    with pytest.raises(ServegymError, match=r"offline cannot be imitated .* plan = '' is not"):
        make_rule_expert("offline", TASK)
    with pytest.raises(ServegymError, match="plan = 'round-robin' is not"):
        make_rule_expert("offline", TASK, "round-robin")
    with pytest.raises(ServegymError, match="plan 'offline' needs the function that plans"):
        make_model(TASK, replace(SMALL, plan="offline"))
    with pytest.raises(ServegymError, match="plan '' needs the function that plans, or neither"):
        make_model(TASK, SMALL, plan_case=reversed_plan)
    planned_agent(tmp_path)
    card = json.loads((tmp_path / CARD_FILE).read_text())
    (tmp_path / CARD_FILE).write_text(json.dumps(card | {"plan": 3}))
    with pytest.raises(ServegymError, match="plan must be a text, got 3"):
        load_agent(tmp_path)
    (tmp_path / CARD_FILE).write_text(json.dumps(card | {"plan": "ofline"}))
    with pytest.raises(ServegymError, match="did you mean 'offline'"):
        make_policy(str(tmp_path), TASK.name)
