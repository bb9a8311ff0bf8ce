"""The records of the simulator's state: what it knows of an episode, a queue, a request, and so on.

The arrays of them are in ``state``.

A word that means no request, client or replica is ``state.NOBODY``.
"""

from __future__ import annotations

from typing import Final

import numpy as np

MACHINE: Final = np.dtype(
    [
        ("clients", np.int64),
        ("blocks", np.int64),  # of KV memory, or UNLIMITED_BLOCKS
        ("watermark_blocks", np.int64),  # free blocks that admission leaves while others run
        ("role", np.int64),  # place in ROLES
        ("round_s", np.float64),  # by which plans count, see ``layout.Fleet``
    ],
    align=True,
)
"""What one replica is."""

EPISODE: Final = np.dtype(
    [
        # The instance, written by ``load`` and ``write_credits``.
        ("requests", np.int64),  # how many requests the episode has
        ("lengths_known", np.int64),  # 1: expected lengths are the true ones; else 0
        ("bound_s", np.float64),  # lower bound of the makespan
        ("round_credit_s", np.float64),  # share of the bound that one request-round earns
        ("prompt_credit_s", np.float64),  # share of the bound that one prompt token earns
        ("random_bits", np.int64),  # the random router's luck
        # The clock: everything until ``now_s`` has been booked.
        ("now_s", np.float64),
        ("turn", np.int64),  # replicas from here on may still decide at ``now_s``
        # Who is where.
        ("routed", np.int64),  # requests 0 … routed − 1 have reached a queue or were rejected
        ("arrived", np.int64),  # how many of them replicas have seen in their queues
        ("arrived_rounds", np.int64),  # Σ expected_rounds over those
        ("finished", np.int64),
        ("rejected", np.int64),  # those that were shed included
        ("shed", np.int64),
        ("in_system", np.int64),  # arrived, neither finished nor rejected
        # Totals so far.
        ("admissions", np.int64),  # admissions after preemptions included
        ("router_turns", np.int64),  # requests that the router has sent somewhere
        ("looked_s", np.float64),  # when the router has last looked at the replicas
        ("served_rounds", np.int64),  # Σ over requests of tokens emitted after the first
        ("admitted_prompt_tokens", np.int64),  # of requests that have emitted a token
        ("in_system_s", np.float64),  # ∫ in_system dt
        ("transfers", np.int64),  # how many are under way
        ("transfer_s", np.float64),  # when the next of them is due; ∞: none
        ("disturbed", np.int64),  # 1: this decision has changed what others may steal or have kept
        ("again", np.int64),  # 1: replicas that sleep are to be asked again at ``now_s``
        ("first_pass", np.int64),  # 1: no replica has been asked twice at ``now_s``
        ("reported_loss", np.float64),  # the loss that rewards have told of
        ("decisions", np.int64),
        # Service, see ``slo``, ``gaps``, ``shedding``. Not in copies for look-ahead: they have no times.
        ("sheds", np.int64),  # 1: requests that would come too late are turned away
        ("counts_slo", np.int64),  # 1: ``met`` is counted, ``State.paces`` noted
        ("met", np.int64),  # finished requests that met both limits
        ("stages", np.int64),  # of the calendar; 0: there is none
        ("ranked", np.int64),  # entries of ``State.ranked`` that the present stage reads
        ("keeps_gaps", np.int64),  # 1: the worst gap between two tokens of each request is noted
    ],
    align=True,
)

QUEUE: Final = np.dtype(
    [
        # Waiting requests in order of service, a linked list; see ``queues``.
        ("first", np.int32),  # or NOBODY
        ("last", np.int32),  # or NOBODY
        ("first_unseen", np.int32),  # it and all behind it have come since the last look; or NOBODY
        ("unplanned", np.int32),  # how many of those that have been seen are in no planned queue
        ("first_unplanned", np.int32),  # if there are any: the first of them, or somebody before it
        ("unseen", np.int32),  # how many they are
        ("unseen_work", np.int64),  # Σ of their tokens to prefill and expected rounds
        ("unseen_blocks", np.int64),  # Σ blocks of their prefills
        # Of those that have been seen.
        ("waiting", np.int64),
        ("stolen", np.int64),  # of them and of the unseen
        ("rounds", np.int64),  # Σ expected rounds left
        ("tokens", np.int64),  # Σ tokens to prefill
        ("blocks", np.int64),  # Σ blocks of these prefills
        ("most_blocks", np.int64),  # none of these prefills takes more; where memory counts
        ("least_blocks", np.int64),  # if there are any, none takes less; where memory counts
        # Σ t² of these is beyond 64 bits for a hundred thousand of the longest prompts: t² in two.
        ("squares_high", np.int64),  # Σ ⌊t² / 2³²⌋
        ("squares_low", np.int64),  # Σ t² mod 2³²
        (
            "unordered",
            np.int64,
        ),  # 1: somebody waits whom ``priority`` does not know, see ``ranking``
    ],
    align=True,
)

REQUEST: Final = np.dtype(
    [
        ("prompt_tokens", np.int32),
        ("decode_rounds", np.int32),  # true output tokens − 1: physics only
        ("expected_rounds", np.int32),  # what the scheduler believes by now: rules only
        ("rank", np.int32),  # place in ``by_length``
        ("plan_client", np.int32),  # of ``plan_replica``, or NOBODY
        ("plan_next", np.int32),  # the next in the same planned queue, or NOBODY
        ("next", np.int32),  # the next that waits in the same queue, or NOBODY
        ("client", np.int32),  # of its replica, or NOBODY
        ("emitted", np.int32),  # tokens emitted before its next or present prefill
        ("computed", np.int32),  # tokens of that prefill which are done
        ("admission", np.int32),  # running number; the newest has the highest
        ("prefilled_tokens", np.int32),  # in all of its prefills so far
        ("plan_replica", np.int16),
        ("replica", np.int16),  # or NOBODY
        ("preemptions", np.int16),
        ("moves", np.int16),
        ("stored", np.int16),  # the replica that keeps its keys and values while it waits, or HOST
        ("phase", np.int8),
        ("bucket", np.int8),  # of LENGTH_BUCKETS, by expected rounds
        ("listed", np.int8),  # 1: it is in the list of a queue, waiting or no more
        ("planned", np.int8),  # 1: it is in the list of a client's planned queue
        ("leaving", np.int8),  # 1: it decodes, and a transfer will take it elsewhere
        ("stolen", np.int8),  # 1: it waits where it has come by theft, and is not stolen again
    ],
    align=True,
)
"""What kernels read of a request at every turn: one cache line of 64 bytes."""

TIMES: Final = np.dtype(
    [
        ("arrival_s", np.float64),
        ("admitted_s", np.float64),  # start of its first prefill stage, NaN before
        ("first_token_s", np.float64),  # end of the stage that emits its first token, NaN before
        ("finished_s", np.float64),  # NaN before
    ],
    align=True,
)

REPLICA: Final = np.dtype(
    [
        ("clock_s", np.float64),  # its last boundary
        ("rounds", np.int64),  # decode rounds run so far: the decode clock
        ("passed", np.int64),  # rounds since then, as whoever shares its pool has last seen; else 0
        ("active", np.int64),  # clients whose request decodes
        ("idle", np.int64),  # clients without a request
        ("sorted", np.int64),  # so many of these, the first, are known to be in ascending order
        ("partial", np.int64),  # the request whose prompt is half computed, or NOBODY
        ("most_running", np.int64),  # requests that may hold a client once this action has admitted
        ("reserve_blocks", np.int64),  # free blocks that it leaves while others run
        ("cached_tokens", np.int64),  # Σ prompt + emitted over the decoding
        ("used_blocks", np.int64),
        # Σ expected_end over the decoding. It may wrap; less active · rounds, Σ rounds left, it is exact.
        ("due_sum", np.int64),
        # What it does now, booked at ``State.event_s``.
        ("stage", np.int64),  # IDLE, PREFILL, DECODE_RUN or MIXED
        ("stage_s", np.float64),
        ("stage_rounds", np.int64),  # the decode clock when its last prefill began; −1: none has
        ("run_rounds", np.int64),  # of a DECODE_RUN
        # Its first boundary since ``end_at`` or ``cut`` last looked, or earlier.
        ("boundary_s", np.float64),
        ("continued_from", np.int64),  # tokens of a prefill begun before that it goes on with
        ("stage_chunks", np.int64),  # requests of whose prefill it computes something
        ("stage_tokens", np.int64),  # that it computes of prefills
        ("stage_squares", np.float64),  # Σ over these chunks of end² − start²
        ("prompt_tokens", np.int64),  # of chunks that begin within a prompt
        ("prompt_squares", np.float64),  # of the same chunks
        ("emitting", np.int64),  # how many of ``picked`` emit a token when it ends
        ("work_waits", np.int64),  # 1: requests waited when it began
        # Transfers.
        ("coming", np.int64),  # to its queue
        ("coming_blocks", np.int64),  # Σ blocks of their prefills
        ("incoming", np.int64),  # to its clients, which are kept for them
        ("incoming_blocks", np.int64),  # Σ blocks kept for these
        ("leaving", np.int64),  # of the decoding
        ("told", np.int64),  # 1: it may admit what it could not when it last decided
        ("stole_s", np.float64),  # when it last stole a running request; −∞: never
        ("ratio", np.float64),  # of outputs for which memory is kept, see ``reserve``
        ("ratio_rounds", np.int64),  # the decode clock from which it falls
        # Totals so far.
        ("idle_wait_s", np.float64),  # idle client-seconds since the last prefill, work waiting
        ("prefill_stages", np.int64),
        ("prefill_s", np.float64),
        ("mixed_stages", np.int64),
        ("busy_decode_s", np.float64),  # Σ over rounds of n / J · seconds
        ("preemptions", np.int64),
        ("overrun_blocks", np.int64),  # most blocks beyond its memory; 0, or there is a fault
        # Gaps between tokens, see ``gaps``.
        ("gap_groups", np.int64),  # in its stack
        (
            "fresh_groups",
            np.int64,
        ),  # of these, on top: those that have emitted nothing together yet
        ("gap_stamp", np.int64),  # of the next group
        ("emitted_s", np.float64),  # when all below the fresh have last emitted a token
    ],
    align=True,
)

TRANSFER: Final = np.dtype(
    [
        ("due_s", np.float64),  # ∞: it waits for a boundary
        ("request", np.int32),
        ("client", np.int32),  # of the target, kept for it; or NOBODY
        ("tokens", np.int32),  # that the target has kept memory for, or whose prefill is on the way
        ("source", np.int16),  # a replica, or HOST
        ("target", np.int16),
        ("kind", np.int64),
    ],
    align=True,
)

LOAD: Final = np.dtype(
    [
        ("waiting", np.int64),  # requests
        ("running", np.int64),  # requests that hold a client
        ("tokens", np.int64),  # expected tokens still to compute
        ("used_blocks", np.int64),
        ("wanted_blocks", np.int64),  # by the prefills of those who wait
        ("unfinished_blocks", np.int64),  # of what begun prefills have not computed
    ],
    align=True,
)
"""A replica as a router sees it."""

CLIENT: Final = np.dtype(
    [
        # A planned queue, a linked list; see ``queues``.
        ("queue_head", np.int32),  # or NOBODY
        ("queue_tail", np.int32),  # or NOBODY
        ("queue_rounds", np.int64),  # Σ expected rounds left of those in it
        ("queue_requests", np.int64),  # how many requests are in it
        # Decode clock when its request should finish; 0: it is idle. Of a request that does not decode yet
        # −1 less the rounds that it should take then.
        ("expected_end", np.int64),
    ],
    align=True,
)

ADMITTED: Final = np.dtype(
    [
        ("request", np.int32),
        ("older", np.int32),  # the client whose request was admitted before; itself: it is idle
        ("newer", np.int32),  # the client whose request was admitted next; itself: it is idle
    ],
    align=True,
)
"""A place in the ring of a replica's clients in order of admission; the last entry is before the oldest."""

CARRIED: Final = np.dtype(
    [
        ("worst_gap_s", np.float64),  # whole once it has finished; else without its group's
        ("last_token_s", np.float64),  # while it does not decode, once it has emitted a token
        ("gap_stamp", np.int64),  # while it decodes; else NOBODY
    ],
    align=True,
)
"""What a request carries of the gaps between its tokens, see ``gaps``."""

GAP_GROUP: Final = np.dtype(
    [
        ("stamp", np.int64),  # of the first that belonged to it
        ("members", np.int64),  # requests that decode
        ("worst_s", np.float64),  # gap between two of their tokens since they decode here
        ("since_s", np.float64),  # while it is fresh: when it began
        (
            "joined",
            np.int64,
        ),  # while it is fresh: the request that landed without a token, or NOBODY
    ],
    align=True,
)
"""Requests of a replica that have had the same worst gap, see ``gaps``."""

PACE: Final = np.dtype(
    [
        ("first_token_s", np.float64),  # NaN: nobody decodes
        ("begun_rounds", np.int64),  # the decode clock less the tokens emitted after the first
        ("limit_s", np.float64),  # of ``[slo]`` per token
    ],
    align=True,
)
"""How long a client's decoding request has taken for its tokens: what observations read of all of them."""

FIT: Final = np.dtype(
    [
        ("rounds", np.float64),  # that a request would idle, at least, at a later stage
        ("stage", np.int32),  # the stage of the calendar where
        ("since", np.int32),  # the first stage looked at; stage < since: not known
    ],
    align=True,
)
"""How well a length fits stages to come, see ``scored``."""

FINISH: Final = np.dtype([("due", np.int64), ("request", np.int64)])

BELIEF: Final = np.dtype([("log_median", np.float64), ("spread", np.float64)])
"""A lognormal distribution of output tokens: log of its median, standard deviation of the log."""
