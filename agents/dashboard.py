"""One picture of a training run, drawn from what TensorBoard would show."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Final, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, PercentFormatter
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from servegym.agents.record import read_record
from servegym.envs.errors import ServegymError

_DPI: Final = 100
_WIDTH, _CHARTS_HEIGHT = 1100, 600  # pixels; a Gantt chart has its own width
_LOG: Final = "tensorboard"
_REFERENCE: Final = "reference-"
_SHARES: Final = ("serving/train_action_share/", "shares/train_")  # older runs have the first
_AGENT, _OTHER, _TRAINING = "#2171b5", "#e08214", "#9ecae1"
_DASHES: Final = ("--", ":", "-.")
_MAX_OF_REFERENCES: Final = 3.0  # an untrained agent's gap would flatten the other lines
_STYLE: Final[dict[Any, Any]] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "grey",
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e6e6e6",
    "font.size": 9,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.8,
    "legend.handlelength": 1.6,
    "legend.fontsize": 8,
    "xtick.color": "dimgrey",
    "ytick.color": "dimgrey",
}


class _Line(NamedTuple):
    steps: NDArray[np.int64]  # (points,)
    values: NDArray[np.float64]  # (points,)


class _Run:
    """The events of a training run and of the policies it is compared with."""

    def __init__(self, folder: Path) -> None:
        if not list((folder / _LOG).glob("events.*")):
            raise ServegymError(
                f"{folder / _LOG}: no event files; --run names the folder of a training run"
            )
        self.record = read_record(folder)
        self._agent = _read(folder / _LOG)
        self.references = {
            path.name.removeprefix(_REFERENCE): _read(path)
            for path in sorted((folder / _LOG).glob(f"{_REFERENCE}*/"))
        }

    @property
    def searched(self) -> bool:
        """Whether whole episodes were searched over: no actions are chosen then, and nobody is asked."""
        return "search" in self.record

    @property
    def unit(self) -> str:
        """What training is counted in."""
        return "episodes" if self.searched else "decisions"

    def line(self, tag: str) -> _Line:
        """Return a scalar of the run; without points if the run has none."""
        return _scalars(self._agent, f"serving/{tag}")

    def shares(self) -> dict[str, _Line]:
        """Return the shares of the actions taken in training, by action."""
        return {
            tag.removeprefix(start): _scalars(self._agent, tag)
            for start in _SHARES
            for tag in self._agent.Tags()["scalars"]
            if tag.startswith(start)
        }

    def constants(self, tag: str) -> dict[str, float]:
        """Return the value of a scalar of each reference, by policy; references without it are left out."""
        lines = {name: _scalars(run, f"serving/{tag}") for name, run in self.references.items()}
        return {name: float(line.values[-1]) for name, line in lines.items() if len(line.steps)}

    def last_picture(self, tag: str) -> NDArray[Any] | None:
        """Return a picture of the last evaluation, (height, width, channels); None if there is none."""
        if f"serving/{tag}" not in self._agent.Tags()["images"]:
            return None
        data = self._agent.Images(f"serving/{tag}")[-1].encoded_image_string
        return np.asarray(imread(io.BytesIO(data), format="png"))


def draw_training_dashboard(folder: Path) -> Figure:
    """Return six charts of a run: gap, utilisations, stages, actions, latency, the last Gantt chart.

    Parameters
    ----------
    folder
        Folder of a training run, finished or not, with ``run.json`` and ``tensorboard/``.

    Raises
    ------
    ServegymError
        If the folder is not that of a run.
    """
    run = _Run(folder)
    with mpl.rc_context(_STYLE):
        figure = _framed(run.last_picture("gantt"))
        if run.searched:
            cells = figure.subplot_mosaic([["gap", "gap"], ["utilization", "stages"]])
        else:
            cells = figure.subplot_mosaic(
                [["gap", "gap", "utilization"], ["stages", "actions", "latency"]],
                height_ratios=[1.15, 1],
            )
        charts: dict[str, Callable[[Axes, _Run], None]] = {
            "gap": _draw_gap,
            "utilization": _draw_utilization,
            "stages": _draw_stages,
            "actions": _draw_actions,
            "latency": _draw_latency,
        }
        logged = (run.line("gap"), *run.shares().values())
        last_step = max([1, *(step for line in logged for step in line.steps)])
        for name, axes in cells.items():
            _prepare(axes, last_step, run.unit)
            charts[name](axes, run)
        figure.suptitle(_title(run), x=0.01, ha="left", fontsize=12)
    return figure


def _title(run: _Run) -> str:
    name = str(run.record["task"].get("name", "")).rpartition("/")[2]
    chosen = run.record["hyperparameters"]
    text = f"{name}: {chosen.get('algorithm')}, seed {chosen.get('seed')}"
    steps, gaps_percent = run.line("gap")
    if len(steps):
        # As in Evaluations, an untrained agent is not the best, an imitated one may be. The first gap
        # may be of a later step: an evaluation with unfinished cases logs none.
        untrained = steps[0] == 0 and not chosen.get("imitation_rounds") and len(steps) > 1
        first = int(untrained)
        best = first + int(gaps_percent[first:].argmin())
        text += f"; best gap {gaps_percent[best]:.2f} % after {steps[best]:,} {run.unit}"
    return text


def _framed(picture: NDArray[Any] | None) -> Figure:
    """Return an empty figure; a Gantt chart, if given, fills its lower edge pixel by pixel."""
    height, width = (0, _WIDTH) if picture is None else picture.shape[:2]
    figure = Figure(figsize=(width / _DPI, (_CHARTS_HEIGHT + height) / _DPI), dpi=_DPI)
    if picture is not None:
        figure.figimage(picture)
    share = height / (_CHARTS_HEIGHT + height)
    engine = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08, rect=(0, share, 1, 1 - share))
    figure.set_layout_engine(engine)
    return figure


def _prepare(axes: Axes, last_step: int, unit: str) -> None:
    axes.set_xlim(-0.02 * last_step, 1.02 * last_step)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel(f"{unit} trained on", color="dimgrey", fontsize=8)
    axes.set_axisbelow(True)


def _draw_gap(axes: Axes, run: _Run) -> None:
    axes.set_title("gap to the proven lower bound (%)")
    evaluated = run.line("gap")
    _plot_training(axes, run.line("train_gap"))
    _plot(axes, evaluated, "agent, greedy, on validation cases", _AGENT)
    references = run.constants("gap")
    _draw_references(axes, references, "{:.2f} %")
    highest = _MAX_OF_REFERENCES * max(references.values(), default=np.inf)
    axes.set_ylim(0, min(axes.get_ylim()[1], highest))
    for step, value in zip(*evaluated, strict=True):
        if value > highest:
            axes.annotate(
                f"↑ {value:.0f} %",
                (step, highest),
                xytext=(0, 3),
                textcoords="offset points",
                ha="right" if step > 0 else "left",
                color=_AGENT,
                fontsize=8,
            )
    _legend(axes, loc="upper right")


def _draw_utilization(axes: Axes, run: _Run) -> None:
    axes.set_title("utilisation")
    for tag, label, colour in (
        ("client_utilization", "clients that hold a request", _OTHER),
        ("decode_utilization", "clients that decode", _AGENT),
    ):
        _plot(axes, run.line(tag), label, colour)
        for style, value in zip(cycle(_DASHES), run.constants(tag).values(), strict=False):
            axes.axhline(value, color=colour, linewidth=1, linestyle=style, alpha=0.7, zorder=1)
    for style, policy in zip(cycle(_DASHES), run.references, strict=False):
        axes.plot([], [], color="dimgrey", linewidth=1, linestyle=style, label=policy)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(max(2 * axes.get_ylim()[0] - 1.0, 0.0), 1.005)  # the lower half is for the legend
    _legend(axes, loc="lower right", ncols=2)


def _draw_stages(axes: Axes, run: _Run) -> None:
    axes.set_title("prefill stages an episode")
    _plot_training(axes, run.line("train_prefill_stages"))
    _plot(axes, run.line("prefill_stages"), "agent", _AGENT)
    _draw_references(axes, run.constants("prefill_stages"), "{:.0f}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(axes, loc="upper right")


def _draw_actions(axes: Axes, run: _Run) -> None:
    """Stack the other actions' shares; the rest above them is decode, by far the most frequent."""
    axes.set_title("actions chosen, share of decisions")
    lines = {name: line for name, line in run.shares().items() if name != "decode"}
    actions, shares = list(lines), list(lines.values())
    if shares and len(shares[0].steps):
        points = min(len(share.steps) for share in shares)
        stacked = np.stack([share.values[:points] for share in shares])
        colours = mpl.colormaps["tab20c"](
            np.arange(len(actions)) % 5 * 4 + np.arange(len(actions)) // 5
        )
        axes.stackplot(
            shares[0].steps[:points], stacked, labels=actions, colors=colours, linewidth=0
        )
        axes.set_ylim(0, 1.05 * float(stacked.sum(axis=0).max()))
        axes.margins(x=0)
        _legend(axes, ncols=2, loc="upper right", title="above: decode", title_fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _draw_latency(axes: Axes, run: _Run) -> None:
    axes.set_title("one decision (µs)")
    for tag, label, colour in (
        ("decision_ms_p99", "99th percentile", _OTHER),
        ("decision_ms_p50", "median", _AGENT),
    ):
        line = run.line(tag)
        _plot(axes, _Line(line.steps, 1000.0 * line.values), label, colour)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend
    _legend(axes, loc="upper left")


def _legend(axes: Axes, **options: Any) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(**options)


def _plot(axes: Axes, line: _Line, label: str, colour: str) -> None:
    if len(line.steps):
        axes.plot(*line, "o-", color=colour, linewidth=1.8, markersize=3.5, label=label)


def _plot_training(axes: Axes, line: _Line) -> None:
    if len(line.steps):
        axes.plot(*line, color=_TRAINING, linewidth=1, label="training episodes")


def _draw_references(axes: Axes, values: dict[str, float], number: str) -> None:
    for style, (policy, value) in zip(cycle(_DASHES), values.items(), strict=False):
        label = f"{policy} ({number.format(value)})"
        axes.axhline(value, color="black", linewidth=1.1, linestyle=style, label=label, zorder=1)


def _read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1}).Reload()


def _scalars(events: EventAccumulator, tag: str) -> _Line:
    points: Sequence[Any] = events.Scalars(tag) if tag in events.Tags()["scalars"] else ()
    return _Line(
        np.array([point.step for point in points], np.int64),
        np.array([point.value for point in points], np.float64),
    )
