"""What the documents say is so: links lead somewhere, code runs, tables and columns agree."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from servegym.envs.playing.evaluation import COLUMNS
from servegym.envs.serving_env import ServingEnv
from servegym.envs.task.registered import TASKS, load_task
from servegym.studies.commands import evaluate
from servegym.studies.policies import make_policy

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = sorted(
    path
    for folder in (".", "results", "scripts/examples")
    for path in (ROOT / folder).glob("*.md" if folder == "." else "**/*.md")
)


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.M)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize(("page", "lines"), [(README, 130), (CONTRIBUTING, 330)])
def test_documents_stay_short(page: Path, lines: int) -> None:
    assert len(page.read_text("utf-8").splitlines()) <= lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text("utf-8")):
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    for name in re.findall(r"scripts/([a-z_]+)\.py", text):
        assert (ROOT / "scripts" / f"{name}.py").is_file(), name
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.(?:py|md|png))`", text):
        assert (ROOT / name).is_file() or (page.parent / name).is_file(), name


def test_the_first_lines_of_code_print_what_they_say(tmp_path: Path) -> None:
    (code,) = blocks(README, "python")
    promised = code.rpartition("# ")[2]
    printed = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout
    assert printed == promised


def test_readme_lists_all_tasks() -> None:
    listed = re.findall(r"^\| `(servegym/\S+)` \|", README.read_text("utf-8"), re.M)
    assert listed == list(TASKS)


def test_the_task_file_is_that_of_a_registered_task(tmp_path: Path) -> None:
    """Every key of the example has the value that GSM8K-v0 has."""
    (code,) = blocks(CONTRIBUTING, "toml")
    (tmp_path / "task.toml").write_text(code, "utf-8")
    task, model = load_task(tmp_path / "task.toml"), TASKS["servegym/GSM8K-v0"]
    for section in ("cluster", "cost", "workload", "information", "process"):
        assert getattr(task, section) == getattr(model, section)


def test_the_policy_of_the_how_to_is_played_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quarter of Tiny-v0's three clients is one client: the same episode as threshold-1's."""
    code = next(block for block in blocks(CONTRIBUTING, "python") if "(Policy)" in block)
    (tmp_path / "quarter.py").write_text(code, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "quarter", raising=False)
    command = next(block for block in blocks(CONTRIBUTING, "sh") if "quarter:Quarter" in block)
    words = shlex.split(command)[2:]
    words[words.index("GSM8K-v0")] = "Tiny-v0"
    words[words.index("--policies") + 1] += ",threshold-1"
    assert evaluate.main([*words, "--jobs", "1"]) == 0
    makespans = pd.read_csv("results/my-policy/episodes.csv").pivot_table(
        index="seed", columns="policy", values="makespan_s"
    )
    assert set(makespans) == {
        "hybrid", "threshold-1", "quarter:Quarter", "quarter:Quarter(share=0.1)",
    }  # fmt: skip
    assert makespans["quarter:Quarter"].equals(makespans["threshold-1"].rename("quarter:Quarter"))


def test_names_of_policies_in_the_how_to_are_policies() -> None:
    text = CONTRIBUTING.read_text("utf-8").partition("play a policy by name")[2].partition("###")[0]
    names = re.findall(r"`((?:threshold|hybrid|rollout)[-(][^`]+)`", text)
    assert len(names) == 5
    for name in names:
        make_policy(name, "servegym/Tiny-v0")


def test_the_cost_model_of_the_how_to_is_played() -> None:
    (code,) = (block for block in blocks(CONTRIBUTING, "python") if "CostTables" in block)
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(code, str(CONTRIBUTING), "exec", dont_inherit=True), names)
    env = names["env"]
    assert isinstance(env, ServingEnv)
    env.reset(seed=1)
    assert env.view().round_s == pytest.approx(0.020)
    assert env.costs.decode_base_s[0, 33] == pytest.approx(0.035)


def test_columns_of_the_table_are_explained() -> None:
    text = (ROOT / "results" / "README.md").read_text("utf-8")
    rows = text.partition("## Columns of `episodes.csv`")[2].splitlines()
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.partition(" | ")[0])}
    assert set(COLUMNS) <= named


def test_the_page_of_gsm8k_repeats_its_table() -> None:
    row = re.compile(r"^\| `?([\w.-]+)`? .*?\| (\d+\.\d\d ± \d\.\d\d)", re.M)
    table = dict(row.findall((ROOT / "results/gsm8k/summary.md").read_text("utf-8")))
    shown = dict(row.findall((ROOT / "results/gsm8k/README.md").read_text("utf-8")))
    assert len(shown) == 9
    assert shown.items() <= table.items()


def test_speeds_in_the_readme_are_measured() -> None:
    text = README.read_text("utf-8")
    table = (ROOT / "results/benchmark/benchmark.md").read_text("utf-8")
    (episode_ms,) = re.findall(r"takes (\S+) ms, a vector", text)
    (thousands,) = re.findall(r"steps (\d+),000 decisions a second", text)
    assert re.search(rf"episode, 1319 requests × 200 clients +\| {episode_ms} +\| ms", table)
    assert re.search(rf"ServingVectorEnv, 256 rows.*, 1 thread +\| {thousands} +\| k/s", table)


def test_pages_count_what_their_tables_hold() -> None:
    """Clusters with moves, moves, and policies, of tables that are made anew now and then."""
    rows = re.findall(
        r"^\| ([a-z][a-z, -]+) \| (\d+) \|.*\| (\d+) \| \d+ \|$",
        (ROOT / "results/checks/reference/clusters.md").read_text("utf-8"),
        re.M,
    )
    assert len(rows) == 13
    checks = (ROOT / "results/checks/README.md").read_text("utf-8")
    assert f"and {sum(int(moves) for *_, moves in rows):,} moves" in checks
    moving = sum(int(clusters) for _, clusters, moves in rows if int(moves))
    balanced = sum(int(clusters) for name, clusters, _ in rows if name.startswith("balancing"))
    assert f"{moving // 1000},000 of them with moves" in (ROOT / "CLUSTER.md").read_text("utf-8")
    assert balanced * 2 == moving
    played = pd.read_csv(ROOT / "results/gsm8k/episodes.csv").policy.nunique()
    assert played == 16
    assert "sixteen policies on the costs" in (ROOT / "results/README.md").read_text("utf-8")


def test_the_calendar_is_above_the_best_known_on_each_case_as_the_page_says() -> None:
    rows = pd.read_csv(ROOT / "results/gsm8k/episodes.csv").query("policy == 'calendar'")
    known = re.findall(
        r"^\| (\d{7}) +\|(?: +[\d.]+ +\|){2} +([\d.]+)",
        (ROOT / "results/best_known/best_known.md").read_text("utf-8"),
        re.M,
    )
    played = rows.set_index("seed").loc[[int(seed) for seed, _ in known]]
    assert len(known) == 10
    assert (played.makespan_s > [float(makespan_s) for _, makespan_s in known]).all()
    page = (ROOT / "results/best_known/README.md").read_text("utf-8")
    assert f"has {100 * played.gap.mean():.2f} % on these cases" in page
