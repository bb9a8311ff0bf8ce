"""Rollout where output lengths are not known: the future is drawn from beliefs, many times.

A rollout that plays predicted means out as if they were certain sees finishes that will not come so, and
plans for them. Here every decision draws all lengths that are not known yet, ``samples`` times: that of a
waiting request from its prediction, that of a running one given the tokens that it has emitted. In each
such future the scheduler of the base rule knows as little as in the real one: it goes by the predictions,
which finishes correct. Every candidate plays the same futures (common random numbers), so that what counts
is the difference on each of them, and a candidate replaces the base's own action only where its mean gain
exceeds so many standard errors: of actions that differ by less than chance the best looks better than it
is. Candidates that are behind after a quarter of the futures are given up.

As long as many requests wait, a candidate is judged by the client-time lost until the queue is empty, not
by the end of the episode: which late request proves long moves the end of a future much more than one
decision does (standard deviation of a difference on GSM8KPredicted-v0: 0.14 points against 0.03).
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from servegym.baselines.rules.compiled import CompiledPolicy, run_episode, take_turn
from servegym.envs.jit import kernel, shared_kernel
from servegym.envs.machine.costs import CostTables
from servegym.envs.process.actions import Settings, apply
from servegym.envs.simulator.events import advance
from servegym.envs.simulator.finishes import key_of, merge
from servegym.envs.simulator.imagination import copy_row
from servegym.envs.simulator.state import (
    NOBODY,
    RUNNING,
    UNLIMITED_BLOCKS,
    WAITING,
    State,
    make_alike,
)
from servegym.envs.workload.requests import MAX_TOKENS

FIRST_SHARE: Final = 4
"""One in so many futures is played before candidates that are behind are given up."""


class Judged(NamedTuple):
    """Candidates after their futures, in seconds of the makespan."""

    gain_s: NDArray[np.float64]  # (candidates,) mean over the futures; −∞ where it was given up
    error_s: NDArray[np.float64]  # (candidates,) standard error of that mean


def draw_rounds(imagined: State, samples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the decode rounds of all requests that wait or run, shape (samples, requests).

    ``imagined`` holds an imagined episode of one replica (``Situation.imagine``). The length of a waiting
    request is drawn from its belief, that of a running one from its belief given that it exceeds the
    tokens emitted so far; neither is longer than what memory holds. Where a length is known it is the
    same in every sample.
    """
    requests = imagined.requests[0]
    rounds = np.tile(requests["expected_rounds"].astype(np.int64), (samples, 1))
    if imagined.beliefs.shape[1] == 0:
        return rounds
    phase, beliefs = requests["phase"], imagined.beliefs[0]
    drawn = (phase == WAITING) | (phase == RUNNING)
    drawn = np.flatnonzero(drawn & (beliefs["spread"] > 0))
    emitted = _emitted(imagined)[drawn]
    log_median, spread = beliefs["log_median"][drawn], beliefs["spread"][drawn]
    # The chance that a length exceeds what was emitted, and its upper tail: accurate far out, too.
    beyond = ndtr((log_median - np.log(np.maximum(emitted, 1))) / spread)
    beyond = np.where(emitted < 1, 1.0, beyond)
    deviations = -ndtri(rng.random((samples, len(drawn))) * beyond)
    log_tokens = np.minimum(log_median + spread * deviations, np.log(MAX_TOKENS))
    most = np.full(len(drawn), MAX_TOKENS)
    blocks = int(imagined.machines[0].blocks)
    if blocks != UNLIMITED_BLOCKS:
        held = blocks * int(imagined.cluster.block_tokens)
        most = np.minimum(most, held - requests["prompt_tokens"][drawn].astype(np.int64))
    tokens = np.maximum(np.rint(np.exp(log_tokens)), emitted + 1)
    rounds[:, drawn] = np.minimum(tokens, np.maximum(most, emitted + 1)).astype(np.int64) - 1
    return rounds


def _emitted(imagined: State) -> NDArray[np.int64]:
    """Return the tokens that each request has emitted, 0 where it has not begun to decode."""
    requests, replica = imagined.requests[0], imagined.replicas[0, 0]
    emitted = requests["emitted"].astype(np.int64)
    running = imagined.finishes[0, 0, : replica["active"]]
    i = running["request"]
    admitted = running["due"] - requests["expected_rounds"][i]  # had it never been preempted
    emitted[i] = replica["rounds"] - admitted + 1
    return emitted


class Futures:
    """Judges first actions by sampled futures in which a base rule goes on.

    Parameters
    ----------
    costs, settings
        The task as kernels read it; one replica.
    base
        The rule that goes on.
    samples
        Futures of each decision, ≥ 1.
    """

    def __init__(
        self, costs: CostTables, settings: Settings, base: CompiledPolicy, samples: int
    ) -> None:
        self._costs, self._settings, self._base = costs, settings, base
        self._samples = samples
        self._rows: tuple[State, State] | None = None

    def judge(
        self, imagined: State, own: int, others: list[int], rng: np.random.Generator
    ) -> Judged:
        """Return what each of the ``others`` gains on the action ``own``."""
        rounds = draw_rounds(imagined, self._samples, rng)
        actions = np.array([own, *others])
        ends_s = np.full((len(rounds), len(actions)), np.nan)
        playing = np.ones(len(actions), np.bool_)
        first = max(-(-len(rounds) // FIRST_SHARE), min(len(rounds), 2))
        self.play(imagined, rounds[:first], actions, playing, ends_s[:first])
        playing[1:] = ends_s[:first, 1:].mean(axis=0) < ends_s[:first, 0].mean()
        if playing[1:].any() and first < len(rounds):
            self.play(imagined, rounds[first:], actions, playing, ends_s[first:])
        gains_s = ends_s[:, :1] - ends_s[:, 1:]
        errors_s = gains_s.std(axis=0, ddof=1 if len(rounds) > 1 else 0) / np.sqrt(len(rounds))
        return Judged(np.where(playing[1:], gains_s.mean(axis=0), -np.inf), errors_s)

    def mean_ends(
        self, imagined: State, actions: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float64]:
        """Return the mean end in seconds after each of some legal actions.

        Differences are those of the time lost where that tells more; the level is that of the best action.
        """
        rounds = draw_rounds(imagined, self._samples, rng)
        lost_s = np.zeros((len(rounds), len(actions)))
        self.play(imagined, rounds, actions, np.ones(len(actions), np.bool_), lost_s)
        means_s: NDArray[np.float64] = lost_s.mean(axis=0)
        best = int(means_s.argmin())
        ends_s = np.zeros((len(rounds), 1))
        first, playing = actions[best : best + 1], np.ones(1, np.bool_)
        self.play(imagined, rounds, first, playing, ends_s, to_the_end=True)
        return means_s - means_s[best] + ends_s.mean()

    def play(
        self,
        imagined: State,
        rounds: NDArray[np.int64],
        actions: NDArray[np.int64],
        playing: NDArray[np.bool_],
        ends_s: NDArray[np.float64],
        *,
        to_the_end: bool = False,
    ) -> None:
        """Write into ``ends_s`` (futures, actions) what :func:`play_futures` does."""
        if self._rows is None or self._rows[0].requests.shape != imagined.requests.shape:
            future, trial = (make_alike(imagined, 1, lengths_known=False) for _ in range(2))
            self._rows = future, trial
        waiting, clients = int(imagined.queues[0, 0].waiting), int(imagined.machines[0].clients)
        early = waiting > clients and not to_the_end
        credit_s = float(self._costs.decode_base_s[0, clients]) / clients if early else 0.0
        play_futures(
            imagined,
            self._costs,
            self._settings,
            self._base,
            rounds,
            actions,
            playing,
            credit_s,
            *self._rows,
            ends_s,
        )


@kernel
def _write_future(imagined: State, rounds: NDArray[np.int64], target: State) -> None:
    """Write into row 0 of ``target`` the imagined episode with these decode rounds as the truth.

    ``target`` is made for unknown lengths: its scheduler goes on believing what it believes now.
    """
    copy_row(imagined, 0, target, 0)
    target.episodes[0].lengths_known = 0
    for i in range(target.episodes[0].requests):
        target.requests[0, i].decode_rounds = rounds[i]
        if imagined.beliefs.shape[1] > 0:
            target.beliefs[0, i] = imagined.beliefs[0, i]
    replica, believed = target.replicas[0, 0], imagined.finishes[0, 0]
    keys = target.keys[0, : replica.active]
    for k in range(replica.active):
        i = believed[k].request
        target.expected[0, 0, k] = believed[k]
        later = rounds[i] - imagined.requests[0, i].expected_rounds
        keys[k] = key_of(believed[k].due + later - replica.rounds, i)
    merge(target.finishes[0, 0], 0, replica.rounds, keys)


@kernel
def _copy_future(state: State, target: State) -> None:
    """Copy row 0 with what its scheduler believes."""
    copy_row(state, 0, target, 0)
    for k in range(state.replicas[0, 0].active):
        target.expected[0, 0, k] = state.expected[0, 0, k]
    if state.beliefs.shape[1] > 0:
        for i in range(state.episodes[0].requests):
            target.beliefs[0, i] = state.beliefs[0, i]


@kernel
def _lost_until_empty(
    state: State, costs: CostTables, policy: CompiledPolicy, credit_s: float
) -> float:
    """Play row 0 on until nobody waits; return the time then, less ``credit_s`` for each round served."""
    episode = state.episodes[0]
    while state.queues[0, 0].waiting > 0:
        r = advance(state, costs, 0)
        if r == NOBODY or not take_turn(state, costs, 0, r, policy):
            break
    end_s = max(episode.now_s, state.event_s[0, 0])  # of the stage that has just begun
    return float(end_s - credit_s * episode.served_rounds)


@shared_kernel
def play_futures(
    imagined: State,
    costs: CostTables,
    settings: Settings,
    base: CompiledPolicy,
    rounds: NDArray[np.int64],
    actions: NDArray[np.int64],
    playing: NDArray[np.bool_],
    credit_s: float,
    future: State,
    trial: State,
    ends_s: NDArray[np.float64],
) -> None:
    """Write when each future ends after each action, ``ends_s`` (futures, actions).

    ``rounds`` (futures, requests) are the true decode rounds of each. The base rule goes on after the
    action. Actions that are not ``playing`` are left out. Where ``credit_s`` > 0 a future ends when nobody
    waits, and so many seconds are taken off for each round that a request was served: what is left is the
    time lost. ``future`` and ``trial`` are one-row states for unknown lengths, and overwritten.
    """
    for s in range(rounds.shape[0]):
        _write_future(imagined, rounds[s], future)
        for c in range(actions.size):
            if not playing[c]:
                continue
            _copy_future(future, trial)
            apply(trial, costs, settings, 0, trial.episodes[0].turn, actions[c])
            if credit_s > 0.0:
                ends_s[s, c] = _lost_until_empty(trial, costs, base, credit_s)
            else:
                run_episode(trial, costs, 0, base)
                ends_s[s, c] = trial.episodes[0].now_s
