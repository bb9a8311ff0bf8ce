"""Pictures of episodes. The only module of this package that imports matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from servegym.envs.process.metrics import EpisodeLog

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure
except ImportError as error:  # pragma: no cover - matplotlib is a core dependency
    raise ImportError("drawing needs matplotlib: pip install matplotlib") from error

PREFILL_COLOUR = "#d1495b"
DECODE_COLOURS = ("#9ecae1", "#2171b5")

_REFERENCE_STYLES: Final[tuple[Any, ...]] = ("--", ":", "-.", (0, (7, 1, 1, 1, 1, 1)))


def draw_gantt_rows(
    axes: Axes, log: EpisodeLog, clients: Sequence[int], *, chunked: bool = False
) -> None:
    """Draw clients over time: decoding in two alternating blues, prefill stages as red bands.

    All clients of a replica stall in a prefill stage, so its band spans them; idle time is white. One
    replica's clients stand above another's, a line between them. With ``chunked`` prompts others
    decode beside a prefill, so only its own client is red. A request that was preempted or has moved is
    drawn where it ran last, from its first token to its end, also over those whom that client served before.
    """
    offsets = np.concatenate(([0], np.cumsum(clients)))
    rows = _rows(log, offsets)
    started = np.isfinite(log.admitted_s) & (rows >= 0)
    last_s = _last_seconds(log)
    ends_s = np.where(np.isfinite(log.finished_s), log.finished_s, last_s)
    turn = _turn(log, rows)
    for shade, colour in enumerate(DECODE_COLOURS):
        chosen = started & (turn % 2 == shade)
        bars = _rectangles(log.first_token_s[chosen], ends_s[chosen], rows[chosen])
        axes.add_collection(
            PolyCollection(list(bars), facecolors=colour, linewidths=0, antialiased=False)
        )
    if chunked:
        bars = _rectangles(log.admitted_s[started], log.first_token_s[started], rows[started])
        axes.add_collection(PolyCollection(list(bars), facecolors=PREFILL_COLOUR, linewidths=0))
    for r in range(0 if chunked else len(clients)):
        here = started & (log.replica == r)
        stages = np.unique(np.stack([log.admitted_s[here], log.first_token_s[here]]), axis=1)
        low, high = offsets[r] / offsets[-1], offsets[r + 1] / offsets[-1]
        for begin, end in stages.T:
            axes.axvspan(begin, end, low, high, color=PREFILL_COLOUR, linewidth=0)
    for offset in offsets[1:-1]:
        axes.axhline(offset - 0.5, color="black", linewidth=0.8)
    axes.set_ylim(-0.5, offsets[-1] - 0.5)
    axes.set_ylabel("client")
    axes.locator_params(axis="y", integer=True)
    if len(clients) > 1:
        _name_replicas(axes, offsets)


def _name_replicas(axes: Axes, offsets: NDArray[np.int64]) -> None:
    """Write the replicas' numbers on the right, at most a dozen of them."""
    count = len(offsets) - 1
    named = range(0, count, -(-count // 12))
    right = axes.secondary_yaxis("right")
    right.set_yticks(
        [(offsets[r] + offsets[r + 1] - 1) / 2 for r in named], [f"replica {r}" for r in named]
    )
    right.tick_params(length=0)


def _rows(log: EpisodeLog, offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each request's client among those of all replicas, −1 without one, shape (requests,)."""
    there = (log.client >= 0) & (log.replica >= 0)
    return np.where(there, offsets[np.maximum(log.replica, 0)] + log.client, -1)


def _rectangles(
    begin_s: NDArray[np.float64], end_s: NDArray[np.float64], row: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return a rectangle per request, one client high, shape (requests, 4 corners, 2)."""
    left = np.stack([begin_s, begin_s, end_s, end_s], axis=1)
    height = row[:, None] + np.array([-0.5, 0.5, 0.5, -0.5])
    return np.stack([left, height], axis=2)


def draw_gantt(
    log: EpisodeLog, clients: int | Sequence[int], title: str, *, chunked: bool = False
) -> Figure:
    """Draw one episode's clients over time; see :func:`draw_gantts`."""
    return draw_gantts([(title, log)], clients, chunked=chunked)


def draw_gantts(
    episodes: Sequence[tuple[str, EpisodeLog]],
    clients: int | Sequence[int],
    *,
    chunked: bool = False,
) -> Figure:
    """Draw several episodes on the same machines below each other, on one time axis.

    Parameters
    ----------
    episodes
        Titles and records.
    clients
        How many clients there are, one number per replica if there are several.
    chunked
        Whether prompts are computed in chunks beside decoding clients.
    """
    clients = [clients] if isinstance(clients, int) else clients
    figure = Figure(figsize=(10, 0.6 + 2.7 * len(episodes)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(episodes), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (title, log) in zip(rows, episodes, strict=True):
        axes.set_title(title, loc="left", fontsize=10)
        draw_gantt_rows(axes, log, clients, chunked=chunked)
    end_s = max(_last_seconds(log) for _, log in episodes)
    rows[-1].set_xlim(0, end_s * 1.005 if end_s > 0 else 1.0)
    rows[-1].set_xlabel("simulated seconds")
    stall = "prefill stage: all clients stall"
    if chunked:
        stall = "prompt being computed"
    elif len(clients) > 1:
        stall = "prefill stage: the replica's clients stall"
    handles = [
        mpl.patches.Patch(color=DECODE_COLOURS[1], label="decoding (shade changes with request)"),
        mpl.patches.Patch(color=PREFILL_COLOUR, label=stall),
        mpl.patches.Patch(facecolor="white", edgecolor="grey", label="idle"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_makespans(episodes: pd.DataFrame) -> Figure:
    """Draw makespan against lower bound: one mark per episode, one colour per policy."""
    figure = Figure(figsize=(7, 4.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    groups = list(episodes.groupby("policy", sort=False))
    for k, (policy, group) in enumerate(groups):
        sheds = (group["gap"].isna() & group["makespan_s"].notna()).any()  # then there is no gap
        axes.scatter(
            group["lower_bound_s"],
            group["makespan_s"],
            # Hollow marks, later ones smaller: policies with equal results stay visible.
            s=60 * (1 - k / len(groups)) + 8,
            marker="osD^vP"[k % 6],
            facecolors="none",
            edgecolors=f"C{k}",
            linewidths=1.2,
            label=policy if sheds else f"{policy} (mean gap {100 * group['gap'].mean():z.1f} %)",
        )
    ends = [episodes["lower_bound_s"].min(), episodes["lower_bound_s"].max()]
    axes.plot(ends, ends, color="black", linewidth=1, label="lower bound")
    axes.set_xlabel("proven lower bound of the case (s)")
    axes.set_ylabel("makespan (s)")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def draw_values(
    clock_s: NDArray[np.float64], estimates: NDArray[np.float64], returns: NDArray[np.float64]
) -> Figure:
    """Draw a critic's value estimates and the actual returns over an episode's time.

    Shapes (decisions,): simulated seconds; estimates and returns in the reward's unit.
    """
    figure = Figure(figsize=(10, 3.3), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.plot(clock_s, returns, color="black", linewidth=1.2, label="actual return to go")
    axes.plot(clock_s, estimates, color=DECODE_COLOURS[1], linewidth=1.2, label="critic's estimate")
    axes.set_xlabel("simulated seconds")
    axes.set_ylabel("return to go")
    axes.legend(fontsize=8, frameon=False)
    return figure


def draw_learning_curves(
    curves: pd.DataFrame,
    references: Mapping[str, float],
    over: Literal["training_s", "timesteps"] = "training_s",
) -> Figure:
    """Draw the gap over the course of training: a line and a band per label, references as dashed lines.

    Parameters
    ----------
    curves
        One row per evaluation: ``label`` (the line), ``seed`` (the training run), ``training_s`` or
        ``timesteps``, and ``gap_percent``, as in ``evaluations.csv``. The line is the mean over seeds, the
        band reaches from the best seed to the worst, as far as all seeds trained.
    references
        Gap in percent by policy name. The axis ends at three times the largest: an untrained
        agent's gap would hide all differences.
    over
        Minutes, or decisions where runs are of different machines.
    """
    unit, axis = (
        (60.0, "minutes of training") if over == "training_s" else (1e6, "million decisions")
    )
    figure = Figure(figsize=(7.5, 4.2), dpi=110, layout="constrained")
    axes = figure.subplots()
    for k, (label, group) in enumerate(curves.groupby("label", sort=False)):
        grid, gaps = _on_one_grid(group, over)
        axes.plot(grid / unit, gaps.mean(axis=0), color=f"C{k}", linewidth=1.8, label=label)
        if len(gaps) > 1:
            least, most = gaps.min(axis=0), gaps.max(axis=0)
            axes.fill_between(grid / unit, least, most, color=f"C{k}", alpha=0.2, linewidth=0)
    for k, (name, gap) in enumerate(references.items()):
        style = _REFERENCE_STYLES[k % len(_REFERENCE_STYLES)]
        text = f"{name} ({gap:z.2f} %)"
        axes.axhline(gap, color="dimgrey", linewidth=1.2, linestyle=style, label=text)
    axes.set_xlim(left=0)
    highest = 3.0 * max(references.values(), default=np.inf)
    axes.set_ylim(top=min(axes.get_ylim()[1], highest))
    if axes.get_ylim()[0] > 0:  # late gains are small beside early ones
        lowest = min([curves["gap_percent"].min(), *references.values()])
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8 * lowest)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(axis)
    axes.set_ylabel("gap to the lower bound (%)")
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _on_one_grid(runs: pd.DataFrame, over: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return points of ``over``, shape (points,), and the gap of each seed there, shape (seeds, points)."""
    seeds = [run.sort_values(over) for _, run in runs.groupby("seed", sort=False)]
    begin = max(run[over].iloc[0] for run in seeds)
    end = min(run[over].iloc[-1] for run in seeds)
    grid = np.unique(np.concatenate([run[over].to_numpy(float) for run in seeds]))
    grid = grid[(grid >= begin) & (grid <= end)]
    gaps = [np.interp(grid, run[over], run["gap_percent"]) for run in seeds]
    return grid, np.stack(gaps)


def to_png(figure: Figure) -> bytes:
    """Return a figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def to_image(figure: Figure) -> NDArray[np.uint8]:
    """Rasterise a figure, shape (height, width, 3)."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _last_seconds(log: EpisodeLog) -> float:
    times = np.concatenate([log.finished_s, log.first_token_s, [0.0]])
    return float(np.nanmax(times))


def _turn(log: EpisodeLog, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of each request among those its client served, shape (requests,)."""
    turn = np.zeros(len(rows), dtype=np.int64)
    order = np.lexsort((log.admitted_s, rows))
    first = np.flatnonzero(np.diff(rows[order], prepend=-2))
    counts = np.diff(np.append(first, len(order)))
    turn[order] = np.arange(len(order)) - np.repeat(first, counts)
    return turn
