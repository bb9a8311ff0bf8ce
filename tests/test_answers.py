"""The three answers: what is drawn and looked up, refusals, a small run of each, committed pages."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from servegym.envs.pictures import to_png
from servegym.envs.playing.evaluation import HELD_OUT_SEED, make_case
from servegym.studies.answers import clients, measured_links, scale, transfer
from servegym.studies.answers.clients import Setting, fixed_clients
from servegym.studies.answers.scale import Size, scale_task
from servegym.studies.answers.transfer import Way, fullest, skewed, transfer_task
from servegym.studies.commands import answer_clients, answer_scale, answer_transfer
from tests.helpers import instance
from tests.test_scripts import refused

ROOT = Path(__file__).parents[1]
ANSWERS = ROOT / "results/answers"


# ---- transfer ------------------------------------------------------------------------------------


def test_a_skewed_order_sends_the_longest_answer_of_each_round_to_the_first_replica() -> None:
    requests = instance((1, 3), (2, 9), (3, 1), (4, 9), (5, 2), (6, 4))  # the last round is short
    ordered = skewed(requests, 1.0, np.random.default_rng(0))
    assert list(ordered.output_tokens) == [9, 9, 3, 1, 4, 2]
    assert list(ordered.prompt_tokens) == [2, 4, 1, 3, 6, 5]
    same = skewed(requests, 0.0, np.random.default_rng(0))
    assert list(same.prompt_tokens) == list(requests.prompt_tokens)
    assert fullest(ordered) == pytest.approx(13 / 7)


def test_skew_keeps_arrival_times() -> None:
    drawn = make_case(transfer.arriving(transfer_task("azure-conv")), 0).requests
    ordered = skewed(drawn, 0.5, np.random.default_rng(1))
    assert np.array_equal(ordered.arrival_s, drawn.arrival_s)
    assert sorted(ordered.output_tokens) == sorted(drawn.output_tokens)
    assert fullest(drawn) < fullest(ordered) < fullest(skewed(drawn, 1.0, np.random.default_rng(1)))


@pytest.mark.parametrize(
    ("way", "steals"),
    [
        (Way(False, "none"), []),
        (Way(True, "none"), ["waiting"]),
        (Way(False, "recompute"), ["running"]),
        (Way(True, "copy", 5.0), ["waiting", "running"]),
    ],
)
def test_what_a_way_steals(way: Way, steals: list[str]) -> None:
    assert way.steals == steals
    assert way in transfer.ways()


def transfer_rows(**changes: float) -> transfer.Rows:
    """Three cases in which makespans are 100, 101, 102 s; ``copy_5`` and the like change them by percent."""
    rows = []
    for seed in range(3):
        for coming in (transfer.BATCH, transfer.ARRIVALS):
            for skew in transfer.SKEWS:
                for way in transfer.ways():
                    factor = 1 + changes.get(f"{way.move}_{way.gbps:g}", 0.0) / 100
                    row: dict[str, Any] = {"seed": seed, "coming": coming, "skew": skew}
                    row |= {"steals": "waiting" if way.waiting else "nothing", "move": way.move}
                    row |= {"gbps": way.gbps, "fullest": 1.0}
                    row |= dict.fromkeys(transfer.MEASURED, (100 + seed) * factor)
                    rows.append(row)
    return transfer.Rows(pd.DataFrame(rows))


def test_the_break_even_is_where_all_faster_links_gain_too() -> None:
    slow = {f"copy_{gbps:g}": 2.0 for gbps in (1.0, 2.0)}
    fast = {f"copy_{gbps:g}": -2.0 for gbps in (5.0, 12.5, 50.0, 200.0, 450.0)}
    rows = transfer_rows(**slow, **fast)
    assert transfer.break_even(rows, "makespan_s", 0.0, False, "none") == "from 5"
    rows = transfer_rows(**slow, **(fast | {"copy_50": 2.0}))
    assert transfer.break_even(rows, "makespan_s", 0.0, False, "none") == "from 200"
    assert transfer.break_even(transfer_rows(), "makespan_s", 0.0, True, "none") == "at none"
    assert transfer.effect(rows.change("makespan_s", 0.0, Way(False, "copy", 5.0))) == "-2.0 ± 0.0"


def test_a_simulated_pause_is_what_was_copied_late() -> None:
    """A copy of 2048 tokens takes some decode steps; only the tokens of these are left to copy."""
    measured = measured_links.LLUMNIX[0]
    link = measured_links.fitted_link(measured)
    token_s = measured.kv_bytes / link.bytes_per_s
    steps = np.ceil((link.latency_s + 2048 * token_s) / measured.step_s)
    pause_s = measured_links.pause_s(measured, 2048, "copy")
    assert pause_s == pytest.approx(steps * token_s, abs=1.01 * token_s)
    assert measured_links.pause_s(measured, 2048, "recompute") > 50 * pause_s


# ---- clients and scale ---------------------------------------------------------------------------


def test_counts_of_clients() -> None:
    assert fixed_clients(10_000, clients.WORST) == 10_000 // (200 + 4096)
    assert fixed_clients(10_000, 1.0) == 17  # 16.7
    assert fixed_clients(100, clients.WORST) == 1


@pytest.mark.parametrize("variation", clients.VARIATIONS)
def test_lengths_vary_as_asked(variation: float) -> None:
    outputs = clients.draw(variation, 0).output_tokens
    assert outputs.max() <= clients.LIMIT
    if variation <= 1:  # beyond, the limit cuts the tail
        assert outputs.mean() == pytest.approx(clients.MEAN_OUTPUT, rel=0.1)
        assert outputs.std() / outputs.mean() == pytest.approx(variation, abs=0.1)


def test_sizes_of_clusters() -> None:
    assert list(scale.sizes(200)) == [Size(200, 1), Size(200, 8)]  # 64 would have 3 clients each
    assert Size(1000, 64) in scale.sizes(1000)
    for size in scale.sizes(20_000):
        cluster = scale_task(size, "hybrid").cluster
        assert (cluster.all_clients, cluster.replicas) == size
    assert Size(200, 1).requests == 1319


# ---- scripts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("answer_transfer", ["--lengths", "azure-conf"], "did you mean 'azure-conv'"),
        ("answer_transfer", ["--lengths", ","], "--lengths names nothing"),
        ("answer_clients", ["--memories", "1000"], "did you mean '10000'"),
        ("answer_scale", ["--most-clients", "199"], "--most-clients must lie in 200 … 20000"),
        ("answer_scale", ["--most-clients", "20001"], "--most-clients must lie in 200 … 20000"),
        *(
            (f"answer_{name}", ["--cases", "1"], "--cases must lie")
            for name in ("transfer", "clients", "scale")
        ),
    ],
)
def test_answers_refuse(tmp_path: Path, script: str, options: list[str], message: str) -> None:
    assert message in refused(script, tmp_path / "out", *options)


@pytest.mark.parametrize(
    ("main", "options", "page"),
    [
        (answer_transfer.main, ["--lengths", "azure-conv"], "transfer.md"),
        (answer_clients.main, ["--memories", "10000"], "clients.md"),
        (answer_scale.main, ["--most-clients", "200"], "scale.md"),
    ],
)
def test_a_small_run_of_each(
    main: Callable[[list[str]], int], options: list[str], page: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(transfer, "REQUESTS", 24)
    monkeypatch.setattr(clients, "REQUESTS", 40)
    monkeypatch.setattr(scale, "DECISIONS", 5)
    options = [*options, "--jobs", "1", "--cases", "2", "--output", str(tmp_path)]
    with redirect_stdout(io.StringIO()):
        assert main(options) == 0
    text = (tmp_path / page).read_text("utf-8")
    assert "2 cases of each" in text
    assert "nan" not in text
    (rows,) = (pd.read_csv(path) for path in tmp_path.glob("*.csv"))
    assert sorted(set(rows["seed"])) == [HELD_OUT_SEED + k for k in range(2)]
    assert (tmp_path / page).with_suffix(".png").stat().st_size > 10_000


# ---- results -------------------------------------------------------------------------------------


def test_the_pages_follow_from_their_rows() -> None:
    tables = {
        name: transfer.Rows(pd.read_csv(ANSWERS / f"transfer/transfer-{name}.csv"))
        for name in transfer.LENGTHS
    }
    command = answer_transfer.command_of(answer_transfer.Args())
    text = transfer.report(tables, measured_links.report(), command)
    assert (ANSWERS / "transfer/transfer.md").read_text("utf-8") == text
    memories = [pd.read_csv(ANSWERS / f"clients/clients-{m}.csv") for m in clients.MEMORIES]
    text = clients.report(
        clients.Rows(pd.concat(memories, ignore_index=True)),
        answer_clients.command_of(answer_clients.Args()),
    )
    assert (ANSWERS / "clients/clients.md").read_text("utf-8") == text
    text = scale.report(
        pd.read_csv(ANSWERS / "scale/scale.csv"), answer_scale.command_of(answer_scale.Args())
    )
    assert (ANSWERS / "scale/scale.md").read_text("utf-8") == text


def test_the_best_fixed_count_is_that_of_least_mean() -> None:
    rows = clients.Rows(pd.read_csv(ANSWERS / "clients/clients-40000.csv"))
    setting = Setting(40_000, 1.0)
    best = rows.best(setting)
    assert all(
        rows.fixed(setting, best).mean() <= rows.fixed(setting, factor).mean()
        for factor in clients.FACTORS
    )


@pytest.mark.parametrize("name", ["transfer", "clients", "scale"])
def test_no_text_is_cut_off_at_the_edge_of_a_picture(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Figure] = []

    def kept(figure: Figure) -> bytes:
        drawn.append(figure)
        return to_png(figure)

    module = {"transfer": transfer, "clients": clients, "scale": scale}[name]
    monkeypatch.setattr(module, "to_png", kept)
    tables = {
        file.stem.removeprefix(f"{name}-"): pd.read_csv(file)
        for file in (ANSWERS / name).glob("*.csv")
    }
    rows = pd.concat(tables.values(), ignore_index=True)
    if name == "transfer":
        transfer.picture({key: transfer.Rows(table) for key, table in tables.items()})
    elif name == "clients":
        clients.picture(clients.Rows(rows))
    else:
        scale.picture(rows)
    (figure,) = drawn
    used, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert used.x0 >= 0
    assert used.y0 >= 0
    assert used.x1 <= width
    assert used.y1 <= height
