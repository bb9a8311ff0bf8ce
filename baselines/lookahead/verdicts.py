"""Was a rule's decision the better one? Both ways are played to the end and compared.

A trigger compares two costs and prefills or decodes. Here, at decisions met while it plays an episode,
the episode is copied, continued once either way and finished by a *judge*, a rule that goes on from
there; the better action is the one after which the episode ends earlier. With the rule itself as judge
this is the advantage of a one-step deviation (what ``rollout`` maximises); another judge shows how much
of the advantage comes from the rule that goes on. The requests left at the end change the makespan more
than a single decision does, so one judge's verdicts within an episode are correlated; the mean end over
several judges averages out much of that chance.

**Errors of the cost estimates.** The Lagrangian rule prefills iff C_d ≥ λ · C_p. If all estimates of
C_p are (1 + x) times the truth, it prefills iff C_d ≥ λ · (1 + x) · C_p; if those of C_d are, iff
(1 + x) · C_d ≥ λ · C_p. So a rule that errs *is* the rule with another multiplier, λ · (1 + x) or
λ / (1 + x), exactly; errors of both that are equal cancel. Errors that differ from one decision to the
next are no multiplier: ``noise`` draws them.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from servegym.baselines.lookahead.rollout import StageChoices, final_clock
from servegym.baselines.rules import triggers
from servegym.baselines.rules.compiled import compile_policy, play_compiled
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.envs.errors import ServegymError
from servegym.envs.playing.evaluation import play
from servegym.envs.playing.policy import Briefing, Situation
from servegym.envs.simulator.events import DECODE
from servegym.envs.simulator.state import State, make_alike
from servegym.envs.simulator.view import DecisionView
from servegym.envs.task.cases import Case
from servegym.envs.task.config import TaskConfig
from servegym.envs.task.lowering import lower
from servegym.envs.workload.plan import Plan

COMPARING: Final = (triggers.LAGRANGIAN, triggers.LOOKAHEAD)
"""Triggers that compare two costs at the events where ``decode`` ends."""

TIE: Final = 1e-9
"""Share of the makespan below which a difference of two ends is rounding."""


@dataclass(frozen=True)
class Verdict:
    """One decision of an episode and how it ends either way, by judge."""

    decision: int  # index among the episode's decisions at which the rule has a choice
    prefills: bool  # what the rule did
    balance: float  # C_d / C_p as the rule sees them: the largest λ at which it would prefill
    decode_s: tuple[float, ...]  # (judges,) makespan if the episode decodes on here
    prefill_s: tuple[float, ...]  # (judges,) … if it prefills under the rule's admission rule

    def lost_s(self, judges: Sequence[int]) -> float:
        """Return by how many seconds decoding on ends later than prefilling; 0 for a tie.

        Of several judges the mean counts.
        """
        decode_s = float(np.mean([self.decode_s[judge] for judge in judges]))
        lost = decode_s - float(np.mean([self.prefill_s[judge] for judge in judges]))
        return lost if abs(lost) > TIE * decode_s else 0.0


def balance(trigger: int, view: DecisionView) -> float:
    """Return the largest multiplier at which a trigger fires: waiting cost / stage cost.

    Raises
    ------
    ServegymError
        If the trigger compares no costs.
    """
    expected = view.idle * view.seconds_to_finish
    if trigger == triggers.LAGRANGIAN:
        waiting, stage = view.idle_wait_s + expected, view.active * view.prefill_s
    elif trigger == triggers.LOOKAHEAD:
        waiting, stage = expected, view.active * view.prefill_fixed_s
    else:
        raise ServegymError("only the Lagrangian and the lookahead rule compare costs at events")
    return waiting / stage if stage > 0 else float("inf")


@dataclass
class VerdictPolicy:
    """Plays as ``policy`` does and notes a verdict at the decisions asked for.

    Parameters
    ----------
    policy
        The rule; its trigger is one of ``COMPARING``.
    judges
        Rules that finish the episodes, none of them planned unless ``policy`` is.
    asked
        Decisions that are judged, counted from 0. Only those count where the rule has a choice:
        clients decode and its admission rule would admit someone.
    noise
        Standard deviation of the logarithm of a factor, of mean 1, by which the estimate of C_p is
        off: drawn anew at each decision.
    """

    policy: TriggerPolicy
    judges: Sequence[TriggerPolicy]
    asked: Container[int]
    noise: float = 0.0
    verdicts: list[Verdict] = field(default_factory=list, init=False)
    played: int = field(default=0, init=False)
    """Decisions so far where the rule had a choice."""

    def __post_init__(self) -> None:
        if self.policy.trigger not in COMPARING:
            raise ServegymError("only the Lagrangian and the lookahead rule can be judged")
        if not (np.isfinite(self.noise) and self.noise >= 0):
            raise ServegymError(f"noise must be ≥ 0, got {self.noise}")

    @property
    def decisions(self) -> Literal["events", "rounds"] | None:
        """Where the rule wants to be asked."""
        return self.policy.decisions

    @property
    def comparison(self) -> Mapping[str, Any]:
        """By what the rule compares waiting requests."""
        return self.policy.comparison

    @property
    def cluster(self) -> Mapping[str, Any]:
        """The guard that the base asks for."""
        return self.policy.cluster

    @property
    def needed_rules(self) -> tuple[str, ...]:
        """The rule's own, where few tasks offer it."""
        return self.policy.needed_rules

    def check_task(self, task: TaskConfig) -> None:
        """Refuse unknown output lengths, and what the rule refuses."""
        if task.information.output_lengths != "known":
            raise ServegymError("verdicts need known output lengths: both ways are played out")
        self.policy.check_task(task)

    def prepare(self, briefing: Briefing) -> Plan | None:
        """Forget the last episode; plan if the rule does."""
        task = briefing.task
        self.check_task(task)
        self.verdicts, self.played = [], 0
        self._rng = briefing.rng
        self._action = task.actions.index(f"prefill:{self.policy.rule}")
        self._finish = _Judges(task, self.judges)
        return self.policy.prepare(briefing)

    def act(self, situation: Situation) -> int:
        """Return what the rule does, and judge it if asked to."""
        mask = situation.mask
        if not (mask[DECODE] and mask[self._action] and situation.view.active > 0):
            return self.policy.act(situation)
        trigger, multiplier = self.policy.trigger, self.policy.parameter
        if self.noise > 0:
            spread = self.noise
            multiplier *= float(np.exp(spread * self._rng.standard_normal() - spread**2 / 2))
        prefills = bool(triggers.fires(trigger, multiplier, situation.view))
        if self.played in self.asked:
            imagined = situation.imagine()
            self.verdicts.append(
                Verdict(
                    self.played,
                    prefills,
                    balance(trigger, situation.view),
                    self._finish.ends(imagined, DECODE),
                    self._finish.ends(imagined, self._action),
                )
            )
        self.played += 1
        return self._action if prefills else DECODE


class _Judges:
    """The judges of one task, and what finishing an episode needs."""

    def __init__(self, task: TaskConfig, judges: Sequence[TriggerPolicy]) -> None:
        machine = lower(task)
        self._costs, self._settings = machine.costs, machine.settings
        self._bases = [compile_policy(judge, task) for judge in judges]
        self._scratch: State | None = None
        self._schedules: list[StageChoices] = []

    def ends(self, imagined: State, first: int) -> tuple[float, ...]:
        """Return the makespan after action ``first``, by judge."""
        _, requests = imagined.requests.shape
        if self._scratch is None:
            self._scratch = make_alike(imagined, 1)
            # Every stage admits someone; the same rule and parameter at each.
            stages = requests + 1
            self._schedules = [
                StageChoices(np.full(stages, base.rule), np.full(stages, base.parameter))
                for base in self._bases
            ]
        return tuple(
            float(
                final_clock(
                    imagined, self._costs, self._settings, base, schedule, first, self._scratch
                )
            )
            for base, schedule in zip(self._bases, self._schedules, strict=True)
        )


def judge_episode(
    task: TaskConfig,
    case: Case,
    policy: TriggerPolicy,
    judges: Sequence[TriggerPolicy],
    samples: int,
    seed: int,
    noise: float = 0.0,
) -> tuple[dict[str, float], list[Verdict]]:
    """Play a case and judge up to ``samples`` ≥ 1 of its decisions, evenly spread over them.

    Returns
    -------
    tuple
        The episode's metrics with ``decisions`` counting those where the rule has a choice, and the
        verdicts in their order.

    Raises
    ------
    ServegymError
        If the rule compares no costs, lengths are not known or ``samples`` is below 1.
    """
    if samples < 1:
        raise ServegymError(f"samples must be ≥ 1, got {samples}")
    first = VerdictPolicy(policy, (), (), noise)
    if noise > 0:  # compiled code draws no noise; the same seed draws the same again
        play(task, "judged", first, case, seed)
        decisions = first.played
    else:
        decisions = int(play_compiled(task, policy, case)["decisions"])
    spread = np.linspace(0, decisions - 1, min(samples, decisions)).round().astype(int)
    judged = VerdictPolicy(policy, judges, frozenset(spread.tolist()), noise)
    row = play(task, "judged", judged, case, seed).row
    return row | {"decisions": judged.played}, judged.verdicts


def tally(verdicts: Sequence[Verdict], judges: Sequence[int]) -> dict[str, float]:
    """Return what a judge, or the mean of several, says of an episode's decisions.

    Returns
    -------
    dict
        Counts ``ties``, ``prefill_better``, ``early`` (the rule prefilled, decoding on was better) and
        ``late`` (the other way round). Sums of seconds: ``stake_s``, lost by the worse action against
        the better one; ``regret_s``, by the rule's action; ``early_s``, by the early ones among them;
        ``decode_regret_s``, had it always decoded on. And ``auc``, the chance that C_d / C_p is larger
        at a decision where prefilling is better than at one where it is not (½: it tells nothing; NaN
        unless both occur).
    """
    lost = np.array([verdict.lost_s(judges) for verdict in verdicts])
    prefills = np.array([verdict.prefills for verdict in verdicts], dtype=bool)
    early, late = prefills & (lost < 0), ~prefills & (lost > 0)
    return {
        "ties": int((lost == 0).sum()),
        "prefill_better": int((lost > 0).sum()),
        "early": int(early.sum()),
        "late": int(late.sum()),
        "stake_s": float(np.abs(lost).sum()),
        "regret_s": float(np.abs(lost[early | late]).sum()),
        "early_s": float(np.abs(lost[early]).sum()),
        "decode_regret_s": float(lost[lost > 0].sum()),
        "auc": _auc(np.array([verdict.balance for verdict in verdicts]), lost),
    }


def _auc(balances: np.ndarray, lost: np.ndarray) -> float:
    """Return the area under the curve of a score for ``lost`` > 0 against ``lost`` < 0."""
    better, worse = balances[lost > 0], balances[lost < 0]
    if len(better) == 0 or len(worse) == 0:
        return float("nan")
    from scipy import stats  # half a second, which every command would wait for

    ranks = stats.rankdata(np.concatenate([better, worse]))
    above = ranks[: len(better)].sum() - len(better) * (len(better) + 1) / 2
    return float(above / (len(better) * len(worse)))
