"""Draw one small episode with the words of the model beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from servegym.envs.errors import ServegymError
from servegym.envs.files import make_folder, write_file
from servegym.envs.pictures import DECODE_COLOURS, PREFILL_COLOUR, to_png
from servegym.envs.playing.evaluation import make_case
from servegym.envs.playing.summary import fixed
from servegym.envs.serving_env import ServingEnv
from servegym.envs.task.registered import TASKS
from servegym.studies.cli import parse

TASK: Final = TASKS["servegym/Tiny-v0"]
SEED: Final = 1
LONGEST: Final = TASK.actions.index("prefill:longest")
"""The action that prefills the longest waiting requests."""
IDLE_CLIENTS: Final = 2
"""The scheduler that is drawn prefills once so many clients are idle (``threshold-2``)."""

_IDLE_COLOUR: Final = "#f0f0f0"
_STALL_COLOUR: Final = "#f3d3d7"
_TEXT: Final[dict[str, Any]] = {"fontsize": 9, "ha": "center", "va": "center"}


@dataclass(frozen=True)
class Args:
    """Draw one small episode with the words of the model beside it."""

    output: Path = Path("results/model/model.png")
    """The picture, a PNG file."""


def main(argv: Sequence[str] | None = None) -> int:
    """Draw."""
    args = parse(Args, argv)
    if args.output.suffix.lower() != ".png":
        raise ServegymError(f"--output must end in .png, got {args.output}")
    picture = to_png(draw_model())
    make_folder(args.output.parent)
    write_file(args.output, picture)
    print(f"wrote {args.output}")
    return 0


def draw_model() -> Figure:
    """Return the picture of one episode of Tiny-v0: its clients over time."""
    env, decisions = play_episode()
    makespan_s, clients = env.metrics()["makespan_s"], TASK.cluster.clients
    figure = Figure(figsize=(9.0, 3.9), dpi=150, layout="constrained")
    axes = figure.subplots()
    _draw_idle(axes, env)
    _draw_requests(axes, env)
    _draw_stages(axes, env)
    _draw_decisions(axes, decisions)
    _draw_end(axes, env.metrics())
    axes.set_ylim(clients + 0.5, -1.9)
    axes.set_yticks(range(clients), [f"client {j}" for j in range(clients)], fontsize=10)
    axes.set_xlim(-0.3, makespan_s + 1.0)
    axes.set_xticks(range(0, int(makespan_s) + 1, 2))
    axes.set_xlabel("simulated seconds")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def play_episode() -> tuple[ServingEnv, list[tuple[float, str]]]:
    """Play the episode; return its environment, and second and choice of each decision."""
    case, env = make_case(TASK, SEED), ServingEnv(TASK)
    env.reset(options={"requests": case.requests, "bound": case.bound})
    decisions, over = [], False
    while not over:
        prefill = env.view().idle >= IDLE_CLIENTS
        decisions.append((env.view().clock_s, "prefill" if prefill else "decode"))
        _, _, terminated, truncated, _ = env.step(LONGEST if prefill else 0)
        over = terminated or truncated
    return env, decisions


def _draw_idle(axes: Axes, env: ServingEnv) -> None:
    """Draw the time that a client holds no request."""
    log, makespan_s = env.records(), env.metrics()["makespan_s"]
    for client in range(TASK.cluster.clients):
        held = log.client == client
        begins_s = [*np.sort(log.admitted_s[held]), makespan_s]
        for begin_s, end_s in zip([0.0, *np.sort(log.finished_s[held])], begins_s, strict=True):
            if end_s > begin_s:
                _bar(axes, client, begin_s, end_s, _IDLE_COLOUR, "idle", "dimgrey")


def _draw_requests(axes: Axes, env: ServingEnv) -> None:
    """Draw each request on its client: prefilled, decoding round by round, stalled by a stage."""
    log, stages = env.records(), _stages(env)
    round_s = float(env.costs.decode_base_s[0, 1])  # Tiny-v0: for any number of clients
    for i, client in enumerate(log.client):
        begin_s, end_s = log.first_token_s[i], log.finished_s[i]
        _bar(axes, client, log.admitted_s[i], begin_s, PREFILL_COLOUR, "prompt", "white")
        _bar(axes, client, begin_s, end_s, DECODE_COLOURS[0])
        axes.vlines(
            np.arange(begin_s, end_s, round_s), *_edges(client), color="white", lw=1.0, zorder=1
        )
        stalls = [stage for stage in stages if begin_s <= stage[0] < end_s]
        for stall in stalls:
            _bar(axes, client, *stall, _STALL_COLOUR, "stalls", PREFILL_COLOUR)
        edges_s = [begin_s, *(second for stall in stalls for second in stall), end_s]
        pieces = list(zip(edges_s[::2], edges_s[1::2], strict=True))
        longest = max(pieces, key=lambda piece: piece[1] - piece[0])
        name = f"request {i}" if longest[1] - longest[0] > 2.5 * round_s else f"req. {i}"
        box = {"facecolor": DECODE_COLOURS[0], "edgecolor": "none", "pad": 1.0}
        axes.text(float(np.mean(longest)), client, name, bbox=box, **_TEXT)


def _stages(env: ServingEnv) -> list[tuple[float, float]]:
    """Return begin and end of each prefill stage, in seconds."""
    log = env.records()
    return sorted(set(zip(log.admitted_s.tolist(), log.first_token_s.tolist(), strict=True)))


def _draw_stages(axes: Axes, env: ServingEnv) -> None:
    """Name, below the clients, the prefill stages and what is between them."""
    stages, below = _stages(env), TASK.cluster.clients - 0.45
    ends_s = [begin_s for begin_s, _ in stages[1:]] + [env.metrics()["makespan_s"]]
    for (begin_s, first_token_s), end_s in zip(stages, ends_s, strict=True):
        for first_s, last_s, text, colour in (
            (begin_s, first_token_s, "prefill\nstage", PREFILL_COLOUR),
            (first_token_s, end_s, "decode\nrounds", DECODE_COLOURS[1]),
        ):
            axes.hlines(below, first_s + 0.06, last_s - 0.06, color=colour, lw=2.5)
            axes.text((first_s + last_s) / 2, below + 0.42, text, color=colour, **_TEXT)


def _draw_decisions(axes: Axes, decisions: Sequence[tuple[float, str]]) -> None:
    """Mark each decision point above the clients, with what was chosen there."""
    for second, choice in decisions:
        axes.plot(second, -0.62, marker="v", color="black", markersize=7)
        axes.text(second, -0.95, choice, **_TEXT)
    axes.text(-0.3, -1.55, "decision points, and what is chosen", fontsize=9, va="center")


def _draw_end(axes: Axes, metrics: Mapping[str, float]) -> None:
    """Draw makespan and lower bound as lines, the gap as the arrow between them."""
    makespan_s, bound_s = metrics["makespan_s"], metrics["lower_bound_s"]
    bottom = TASK.cluster.clients - 0.5
    axes.vlines(makespan_s, -1.2, bottom, color="black", lw=1.5)
    axes.vlines(bound_s, -1.2, bottom, color="black", lw=1.5, linestyle="--")
    axes.text(makespan_s, -1.55, f"makespan\n{makespan_s:.2f} s", **_TEXT)
    axes.text(bound_s, -1.55, f"lower bound\n{bound_s:.2f} s", **_TEXT)
    arrow = {"arrowstyle": "<->", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", (bound_s, -0.66), (makespan_s, -0.66), arrowprops=arrow)
    axes.text((bound_s + makespan_s) / 2, -0.95, f"gap {fixed(100 * metrics['gap'], 1)} %", **_TEXT)


def _bar(
    axes: Axes,
    client: int,
    begin_s: float,
    end_s: float,
    colour: str,
    text: str = "",
    text_colour: str = "black",
) -> None:
    top, bottom = _edges(client)
    axes.barh(client, end_s - begin_s, bottom - top, begin_s, color=colour, linewidth=0)
    axes.text(begin_s + 0.2, client, text, color=text_colour, fontsize=9, va="center")


def _edges(client: int) -> tuple[float, float]:
    """Return top and bottom of a client's bar; clients are 1 apart."""
    return client - 0.38, client + 0.38
