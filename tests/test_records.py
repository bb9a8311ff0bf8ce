"""Records of every request: their file, resuming, names; metrics and pictures of a cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from servegym.baselines.registry import make_policy
from servegym.baselines.rules.policies import TriggerPolicy
from servegym.baselines.rules.triggers import EAGER
from servegym.envs import ServegymError, TaskConfig, load_task, make_case, make_requests, play
from servegym.envs.pictures import draw_gantt, draw_gantt_rows, to_png
from servegym.envs.playing.evaluation import COLUMNS, Episode, evaluate, read_episodes
from servegym.envs.playing.records import RECORD_COLUMNS, records_path, records_table
from servegym.envs.task.config import with_overrides
from servegym.envs.task.registered import TASKS
from servegym.envs.vocabulary import ADMISSION_GUARDS, MIGRATIONS, ORDERS, ROUTERS, VICTIMS
from servegym.envs.workload.requests import Requests
from servegym.studies.commands import evaluate as command

PROMISED = (
    "request,replica,client,arrival_s,admitted_s,first_token_s,finished_s,prompt_tokens,output_tokens,"
    "preemptions,recomputed_tokens,moves,met_slo,gap_between_tokens_s,class"
)
CLUSTER = """
[cluster]
replicas = 3
clients = 4
kv_capacity_tokens = 128
kv_block_tokens = 16
[[cluster.replica]]
[[cluster.replica]]
speed = 2.0
[[cluster.replica]]
clients = 2
[cost]
preset = "tiny"
[workload]
source = "work.csv"
"""
BESIDE = (
    "replicas,mixed_stages,preemptions,recomputed_tokens,rejected,moves,e2e_p50_s,e2e_p99_s,"
    "goodput_per_s,slo_attainment,gap_between_tokens_p50_s,gap_between_tokens_p99_s,e2e_mean_s,"
    "jain_fairness,peak_queue,idle_wait_share,preempted_slowdown,recompute_tax,memory_overrun_blocks,"
    "shed"
)


@pytest.fixture
def task(tmp_path: Path) -> TaskConfig:
    """Two dozen requests in no order of arrival; the sixth and the last are larger than any memory."""
    rng = np.random.default_rng(0)
    rows = [
        (int(rng.integers(5, 50)), int(rng.integers(1, 40)), round(float(rng.uniform(0, 20)), 2))
        for _ in range(24)
    ]
    rows[5], rows[-1] = (125, 4, 2.0), (900, 4, 1e4)
    lines = ["prompt_tokens,output_tokens,arrival_s", *(f"{p},{o},{a}" for p, o, a in rows)]
    (tmp_path / "work.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    return load_task(str(tmp_path / "cluster.toml"))


def run(
    task: TaskConfig, output: Path, names: list[str], seeds: range, *, records: bool = True
) -> pd.DataFrame:
    return evaluate(task, make_policy, names, seeds, output, progress=False, records=records)


def played(task: TaskConfig, name: str = "fcfs") -> Episode:
    return play(task, name, make_policy(name), make_case(task, 0), seed=0)


def test_rows_are_those_of_the_workload_file(task: TaskConfig, tmp_path: Path) -> None:
    run(task, tmp_path / "out", ["fcfs"], range(1))
    text = (tmp_path / "out/records/fcfs-0.csv").read_text()
    assert text.splitlines()[0] == PROMISED == ",".join(RECORD_COLUMNS)
    table, work = (
        pd.read_csv(tmp_path / "out/records/fcfs-0.csv"),
        pd.read_csv(tmp_path / "work.csv"),
    )
    assert table["request"].tolist() == list(range(24))
    for column in work.columns:
        assert table[column].tolist() == work[column].tolist()
    assert text.splitlines()[6] == "5,,,2.0,,,,125,4,,,,0,,"  # rejected: only what it brought
    assert text.splitlines()[24] == "23,,,10000.0,,,,900,4,,,,0,,"
    served = table.drop([5, 23])
    assert set(served["replica"]) == {0, 1, 2}
    assert (served["client"] < served["replica"].map({0: 4, 1: 4, 2: 2})).all()
    assert (served["arrival_s"] <= served["admitted_s"]).all()
    assert (served["admitted_s"] < served["first_token_s"]).all()
    assert (served["first_token_s"] <= served["finished_s"]).all()


def test_metrics_count_what_the_records_hold(task: TaskConfig) -> None:
    row, log = (episode := played(task)).row, episode.records
    table = records_table(log)
    assert row["replicas"] == 3
    assert row["rejected"] == 2
    assert row["unfinished_requests"] == row["moves"] == row["mixed_stages"] == 0
    assert row["preemptions"] == table["preemptions"].sum() > 0
    assert row["recomputed_tokens"] == table["recomputed_tokens"].sum() > 0
    assert row["makespan_s"] == table["finished_s"].max() < 1e4  # not until the last is rejected
    assert row["gap"] == row["makespan_s"] / row["lower_bound_s"] - 1
    lasted = (table["finished_s"] - table["arrival_s"]).dropna()
    assert (row["e2e_p50_s"], row["e2e_p99_s"]) == tuple(np.percentile(lasted, (50, 99)))


def test_mixed_stages_are_counted(task: TaskConfig) -> None:
    task = with_overrides(task, {"cluster": {"chunk_tokens": 16}})
    policy = TriggerPolicy("fcfs", EAGER, mixed=True)
    assert play(task, "mixed", policy, make_case(task, 0), seed=0).row["mixed_stages"] > 0


def test_if_all_are_rejected_there_is_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "work.csv").write_text("prompt_tokens,output_tokens,arrival_s\n9,9,0\n9,9,1\n")
    task = with_overrides(
        TASKS["servegym/Tiny-v0"],
        {"cluster": {"kv_capacity_tokens": 4}, "workload": {"source": tmp_path / "work.csv"}},
    )
    table = run(task, tmp_path / "out", ["fcfs"], range(1))
    row = table.iloc[0]
    assert (row["rejected"], row["makespan_s"], row["gap"]) == (2, 0, 0)
    assert len(read_episodes(tmp_path / "out/episodes.csv")) == 1


def test_what_has_not_happened_is_empty(task: TaskConfig) -> None:
    """Far more arrives than can be served: the run ends at its cap."""
    task = with_overrides(task, {"process": {"max_seconds": 12.0}})
    episode = played(task)
    table = records_table(episode.records)
    finished = int(table["finished_s"].notna().sum())
    rejected = episode.row["rejected"]
    assert 0 < finished < 22
    assert episode.row["unfinished_requests"] == 24 - finished - rejected
    assert np.isnan(episode.row["makespan_s"])
    future = table[table["arrival_s"] > 12.0 + 5.0]
    assert len(future) > 0
    assert future[["client", "admitted_s", "first_token_s", "finished_s"]].isna().all(axis=None)
    running = table["admitted_s"].notna() & table["finished_s"].isna()
    assert running.any()
    assert table.loc[table["first_token_s"].notna(), "admitted_s"].notna().all()


def test_an_episode_without_records_is_played_again(task: TaskConfig, tmp_path: Path) -> None:
    first = run(task, tmp_path, ["fcfs", "hybrid"], range(3), records=False)
    assert not (tmp_path / "records").exists()
    second = run(task, tmp_path, ["hybrid"], range(1, 3))
    names = sorted(path.name for path in (tmp_path / "records").iterdir())
    assert names == ["hybrid-1.csv", "hybrid-2.csv"]
    timed = ["decision_ms_p50", "decision_ms_p99", "prepare_s"]
    assert second.drop(columns=timed).to_dict("list") == first[
        (first["policy"] == "hybrid") & (first["seed"] > 0)
    ].drop(columns=timed).to_dict("list")
    assert len(read_episodes(tmp_path / "episodes.csv")) == 6  # no row stands there twice
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    (tmp_path / "records/hybrid-2.csv").unlink()
    run(task, tmp_path, ["hybrid"], range(1, 3))
    kept = tmp_path / "records/hybrid-1.csv"
    assert kept.stat().st_mtime_ns == before[kept]
    assert (tmp_path / "records/hybrid-2.csv").exists()


def test_records_are_written_again_with_their_row(task: TaskConfig, tmp_path: Path) -> None:
    run(task, tmp_path, ["fcfs"], range(1))
    path = tmp_path / "records/fcfs-0.csv"
    good = path.read_bytes()
    path.write_text("of another play")
    (tmp_path / "episodes.csv").unlink()
    run(task, tmp_path, ["fcfs"], range(1), records=False)
    assert path.read_bytes() == good


def test_a_folder_that_cannot_be_made_is_one_line(task: TaskConfig, tmp_path: Path) -> None:
    (tmp_path / "records").write_text("in the way")
    with pytest.raises(ServegymError, match="records: cannot be made"):
        run(task, tmp_path, ["fcfs"], range(1))
    assert not len(read_episodes(tmp_path / "episodes.csv"))


def test_every_policy_has_a_file_name_of_its_own() -> None:
    names = ["fcfs", "FCFS", "a/b", "a_b", "a\\b", "../b", "..", ".", "é", "e", "a b", "", "x" * 500,
             "x" * 501, "a:b", "-", "threshold-12", "a\0b", "con/../x"]  # fmt: skip
    paths = [records_path(Path("out"), name, 7) for name in names]
    assert len({str(path).lower() for path in paths}) == len(names)
    for path in paths:
        assert path.parent == Path("out/records")
        assert len(path.name) < 120
        assert path.name.isascii()
        assert not path.name.startswith((".", "-"))
    assert paths[0].name == "fcfs-7.csv"
    assert paths[16].name == "threshold-12-7.csv"


def test_the_command_writes_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "Tiny-v0", "--policies", "fcfs", "--seeds", "0:2", "--jobs", "1"]
    options += ["--optimum-limit", "0"]  # the search needs compiled integers
    assert command.main([*options, "--output", str(tmp_path), "--records"]) == 0
    assert "records" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == [
        "fcfs-0.csv",
        "fcfs-1.csv",
    ]


@pytest.mark.parametrize(
    ("flag", "texts"),
    [
        ("--list-routers", ROUTERS),
        ("--list-victims", VICTIMS),
        ("--list-guards", ADMISSION_GUARDS),
        ("--list-orders", ORDERS),
        ("--list-migrations", MIGRATIONS),
    ],
)
def test_listings(capsys: pytest.CaptureFixture[str], flag: str, texts: dict[str, str]) -> None:
    assert command.main([flag]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=1) for line in lines] == [list(item) for item in texts.items()]


def test_columns_of_the_cluster_come_last() -> None:
    assert ",".join(COLUMNS).endswith(f",decision_points,prepare_s,unfinished_requests,{BESIDE}")


def test_tables_of_earlier_versions_read_with_defaults(tmp_path: Path) -> None:
    run(TASKS["servegym/Tiny-v0"], tmp_path, ["fcfs"], range(2), records=False)
    path = tmp_path / "episodes.csv"
    pd.read_csv(path).drop(columns=BESIDE.split(",")).to_csv(path, index=False)
    table = read_episodes(path)
    assert table["replicas"].tolist() == [1, 1]
    for name in ("mixed_stages", "preemptions", "recomputed_tokens", "rejected", "moves", "shed"):
        assert table[name].tolist() == [0, 0]
    assert table[BESIDE.split(",")[6:-1]].isna().all(axis=None)


def test_requests_know_their_rows() -> None:
    moved = make_requests([1, 2, 3], [4, 5, 6], [2.0, 0.0, 1.0], [4, 5, 6])
    assert moved.rows is not None
    assert moved.rows.tolist() == [1, 2, 0]
    assert moved.as_predicted().rows is moved.rows
    first = moved.first(2)
    assert first is not None
    assert first.rows is None
    assert make_requests([1, 2], [4, 5], [1.0, 1.0]).rows is None
    ones = np.ones(2, np.int64)
    Requests(np.zeros(2), ones, ones, ones, None, np.array([1, 0]))
    for rows in ([0, 0], [0, 2**40 + 1], [-1, 0], [0], [0.5, 1]):
        with pytest.raises(ServegymError, match="rows"):
            Requests(np.zeros(2), ones, ones, ones, None, np.array(rows))


def bands(figure: Figure) -> set[tuple[float, float]]:
    """Where prefill bands begin and end, in shares of the clients."""
    return {(patch.get_y(), patch.get_height()) for patch in figure.axes[0].patches}  # type: ignore[attr-defined]


def test_a_band_spans_its_replica(task: TaskConfig) -> None:
    episode = played(task)
    figure = draw_gantt(episode.records, (4, 4, 2), "three replicas")
    axes = figure.axes[0]
    assert {(round(y, 9), round(h, 9)) for y, h in bands(figure)} == {
        (0.0, 0.4),
        (0.4, 0.4),
        (0.8, 0.2),
    }
    assert axes.get_ylim() == (-0.5, 9.5)
    assert [line.get_ydata()[0] for line in axes.lines] == [3.5, 7.5]  # type: ignore[index]
    assert len(to_png(figure)) > 1000


def test_with_chunks_only_the_own_client_is_red(task: TaskConfig) -> None:
    figure = draw_gantt(played(task).records, (4, 4, 2), "chunks", chunked=True)
    assert not bands(figure)
    assert len(figure.axes[0].collections) == 3


def test_one_replica_is_drawn_as_ever() -> None:
    log = played(TASKS["servegym/Tiny-v0"]).records
    assert to_png(draw_gantt(log, 3, "x")) == to_png(draw_gantt(log, (3,), "x"))
    assert bands(draw_gantt(log, 3, "x")) == {(0.0, 1.0)}
    assert not Figure().subplots().lines
    axes = Figure().subplots()
    draw_gantt_rows(axes, log, [3])
    assert not axes.lines
    assert not axes.child_axes


def test_pictures_of_many_replicas_and_of_preempted_requests(task: TaskConfig) -> None:
    many = with_overrides(task, {"cluster": {"replica": (), "replicas": 40}})
    to_png(draw_gantt(played(many).records, (4,) * 40, "forty"))
    cut = with_overrides(task, {"process": {"max_seconds": 25.0}})
    to_png(draw_gantt(played(cut).records, (4, 4, 2), "cut short"))
