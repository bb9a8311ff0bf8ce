"""Triggers: when to interrupt decoding for a prefill stage. One small compiled function each.

A trigger is asked only where both actions are legal: some clients decode, others are idle, and the
admission rule would admit a request. The policy object and the compiled episode loop call the same functions.
"""

from __future__ import annotations

from typing import Final

from servegym.envs.jit import kernel
from servegym.envs.simulator.outlook import Outlook
from servegym.envs.simulator.view import DecisionView

EAGER: Final = 0
DRAINED: Final = 1
THRESHOLD: Final = 2
LAGRANGIAN: Final = 3
MYOPIC: Final = 4
LOOKAHEAD: Final = 5
WAITED: Final = 6
FEEDBACK: Final = 7
CALENDAR: Final = 8


@kernel
def fires(trigger: int, parameter: float, view: DecisionView) -> bool:
    """Return whether to prefill now under a trigger with its one parameter."""
    if trigger == EAGER:
        return True
    if trigger == DRAINED:
        return False  # once no client decodes, prefilling is forced and the trigger is not asked
    if trigger == THRESHOLD:
        return view.idle >= parameter
    if trigger == LAGRANGIAN:
        return lagrangian(parameter, view)
    if trigger == MYOPIC:
        return myopic(parameter, view)
    if trigger == LOOKAHEAD:
        return lookahead(parameter, view)
    if trigger == FEEDBACK:
        return feedback(parameter, view)
    if trigger == CALENDAR:
        return due(parameter, view)
    return waited(parameter, view)


@kernel
def lagrangian(multiplier: float, view: DecisionView) -> bool:
    """Paper, Section IV.C: prefill iff C_d ≥ λ·C_p, with waiting accumulated and expected.

    Makespan = ∫ dt splits into client-time: J·makespan = work + idle + stalled. The schedule that
    minimises it trades the idle client-time of waiting (C_d) against the client-time that active
    clients stall in a prefill stage (C_p). Relax the constraint that ties the two (an idle client is
    refilled only by a stage) with a multiplier λ: a stage is worth inserting once the idle time that
    the last one has let accumulate, together with what will be added by the next chance to decide
    (the next finish), reaches λ times what a stage costs,

        C_d = ∫ idle dt since the last stage + idle · (seconds until the next finish)
        C_p = active · (seconds of the stage that would be inserted).

    This is the part-period balancing rule of lot sizing, with idle time as holding cost and the
    stall as set-up cost; λ = 1 balances the two.
    """
    waiting_cost = view.idle_wait_s + view.idle * view.seconds_to_finish
    return waiting_cost >= multiplier * view.active * view.prefill_s


@kernel
def priced(
    multiplier: float, memory: float, slo: float, view: DecisionView, outlook: Outlook
) -> bool:
    """Add prices of memory and of missed limits to the Lagrangian rule: this project's own, for clusters.

    Two more constraints tie a stage to what comes later: all that run must fit into the memory, and
    requests must meet ``[slo]``. Relaxed with a price each, they add to both sides of :func:`lagrangian`:
    prefill iff

        C_d + slo · W  ≥  λ · C_p + memory · C_m + slo · N,

        C_m = (active + admitted) · (seconds of a stage that computes again what would be evicted)
        W   = waiting requests that this stage, but not the next chance, gives a first token in time
        N   = running requests that meet their time per token without this stage, but not with it.

    What would be evicted is by how many tokens the expected need at its fullest exceeds the memory more
    than without the stage: admitted now, they are computed twice, while all clients stall. ``memory`` is a
    share of that cost, 1 counts it as the client-time that it is; ``slo`` is in client-seconds a request.
    With both 0 it is the paper's rule.
    """
    waiting_cost = view.idle_wait_s + view.idle * view.seconds_to_finish
    evicting_cost = (view.active + outlook.admitted) * outlook.recompute_s
    price = multiplier * view.active * view.prefill_s + memory * evicting_cost
    return waiting_cost + slo * outlook.saved >= price + slo * outlook.lost


@kernel
def myopic(multiplier: float, view: DecisionView) -> bool:
    """Compare one step only: idle client-time of the next decode round against the stall.

    The same comparison without memory and without foresight; kept to show what both are worth.
    """
    return view.idle * view.round_s >= multiplier * view.active * view.prefill_s


@kernel
def lookahead(multiplier: float, view: DecisionView) -> bool:
    """Prefill iff the idle time until the next finish outweighs the *fixed* part of the stall.

    The part of a stage that its tokens explain has to be paid whenever they are admitted; only the
    fixed part is saved by waiting for another client to join.
    """
    saved = view.active * view.prefill_fixed_s
    return view.idle * view.seconds_to_finish >= multiplier * saved


@kernel
def waited(multiplier: float, view: DecisionView) -> bool:
    """Prefill once the idle time accumulated since the last stage reaches the fixed part of a stall.

    It may fire between two finishes, so it is asked at every decode round.
    """
    return view.idle_wait_s >= multiplier * view.active * view.prefill_fixed_s


@kernel
def feedback(multiplier: float, view: DecisionView) -> bool:
    """Look ahead without predictions: the next finish comes at the rate of those so far.

    Served request-rounds per finished request are the mean time a client holds one, if finishing is
    taken to be memoryless; n active clients then finish one every n-th of it. Before the first finish
    nothing is known, and nothing is waited for.
    """
    if view.finished == 0:
        return True
    rounds = view.served_rounds / (view.finished * view.active)
    saved = view.active * view.prefill_fixed_s
    return view.idle * rounds * view.round_s >= multiplier * saved


@kernel
def due(multiplier: float, view: DecisionView) -> bool:
    """Prefill at the first finish at or after each stage of the calendar; behind the last, look ahead."""
    if view.next_stage < 0:
        return lookahead(multiplier, view)
    return view.next_stage <= view.round
