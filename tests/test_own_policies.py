"""A user's policy: a class of a module in the working directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pandas as pd
import pytest

from servegym.envs import ServegymError
from servegym.studies.cli import run
from servegym.studies.commands import evaluate
from servegym.studies.own_policies import is_own_policy
from servegym.studies.policies import make_policy

MODULE = """
    import numpy as np
    from servegym.envs import Policy, ServegymError, plan_from_queues

    class First(Policy):
        "Takes the last legal action; with `least`, the first."
        def __init__(self, least=False):
            self.least = least
        def act(self, situation):
            legal = np.flatnonzero(situation.mask)
            return int(legal[0 if self.least else -1])

    class Often(First):
        decisions = "rounds"

    class Never(Policy):
        decisions = "never"
        def act(self, situation):
            return 0

    class Known(Policy):
        comparison = {"output_lengths": "known"}
        def act(self, situation):
            return 0

    class Listed(First):
        comparison = ["mean"]

    class Called(First):
        def comparison(self):
            return {"compare_by": "mean"}

    class Quantiles(First):
        comparison = {"compare_by": "quantile", "quantile": 0.9}

    class Beside(First):
        def prepare(self, briefing):
            return plan_from_queues([[0], [1]])

    class Refusing(First):
        def prepare(self, briefing):
            raise ServegymError("too many requests")

    class Blind(First):
        def act(self, situation):
            raise ServegymError("nothing to see")

    class Illegal(Policy):
        def act(self, situation):
            return int(np.flatnonzero(~situation.mask)[0])

    class Beyond(Policy):
        def act(self, situation):
            return 99

    class Texts(Policy):
        def act(self, situation):
            return "decode"

    class Bare:
        def prepare(self, briefing):
            return None

    def first():
        return First(least=True)

    NUMBER = 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's modules, where the shell stands."""
    import sys

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_policies.py").write_text(dedent(MODULE))
    (tmp_path / "users_broken.py").write_text("1 / 0")
    (tmp_path / "users_lost.py").write_text("import no_such_module")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("users_")]:
        del sys.modules[name]


def played(policies: str, jobs: int = 1) -> pd.DataFrame:
    options = ["--task", "Tiny-v0", "--policies", policies, "--seeds", "1000000:1000004"]
    assert evaluate.main([*options, "--output", "out", "--jobs", str(jobs)]) == 0
    return pd.read_csv("out/episodes.csv")


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("users_policies:First", True),
        ("package.module:Class(key=1)", True),
        ("rollout:hybrid", False),
        ("rollout-6:hybrid", False),
        ("fcfs", False),
        ("a/b:c", False),
        ("module:", False),
        (":Class", False),
        ("1module:Class", False),
    ],
)
def test_which_names_are_of_this_form(name: str, own: bool) -> None:
    assert is_own_policy(name) == own


@pytest.mark.usefixtures("here")
def test_it_is_evaluated_beside_the_others() -> None:
    table = played(
        "users_policies:First, users_policies:First(least=True), users_policies:first, fcfs"
    )
    means = table.groupby("policy")["makespan_s"].mean()
    assert means["users_policies:first"] == means["users_policies:First(least=True)"]
    assert means["users_policies:First"] != means["users_policies:first"]
    assert len(table) == 16


@pytest.mark.usefixtures("here")
def test_it_may_say_by_what_requests_are_compared() -> None:
    table = played("users_policies:First,users_policies:Quantiles,users_policies:First(least=1)")
    means = table.groupby("policy")["makespan_s"].mean()
    assert means["users_policies:Quantiles"] == means["users_policies:First"]  # lengths are known


@pytest.mark.usefixtures("here")
def test_workers_find_it_too() -> None:
    alone = played("users_policies:First")
    table = played("users_policies:First,users_policies:Often", jobs=2)
    again = table[table["policy"] == "users_policies:First"]
    assert again["makespan_s"].tolist() == alone["makespan_s"].tolist()
    asked = table.groupby("policy")["decision_points"].first()
    assert asked.to_dict() == {"users_policies:First": "events", "users_policies:Often": "rounds"}


def test_changed_source_is_not_mixed_with_old_rows(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    played("users_policies:First")
    (here / "users_policies.py").write_text(dedent(MODULE) + "# changed\n")
    options = [
        "--task",
        "Tiny-v0",
        "--policies",
        "users_policies:First",
        "--seeds",
        "1000000:1000009",
    ]
    with pytest.raises(SystemExit) as stop:
        run(evaluate.main, [*options, "--output", "out"])
    assert stop.value.code == 2
    assert "another source of 'users_policies:First'" in capsys.readouterr().err
    assert len(pd.read_csv("out/episodes.csv")) == 4


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("users_missing:First", "no module 'users_missing' in"),
        ("users_policies.more:First", "no module 'users_policies.more' in|cannot be imported"),
        ("users_broken:First", "users_broken cannot be imported: ZeroDivisionError"),
        ("users_lost:First", "users_lost cannot be imported: No module named 'no_such_module'"),
        ("users_policies:Frist", "did you mean 'First'"),
        ("users_policies:NUMBER", "neither a class that can be built nor a function"),
        ("users_policies:First(more=1)", "unexpected keyword argument 'more'"),
        ("users_policies:First(1)", "write key=value"),
        ("users_policies:First(least=x)", "write key=value"),
        ("users_policies:First(least=)", "write key=value"),
        ("users_policies:First(least=2,least=2)", "least is given twice"),
        ("users_policies:First(least=2)(more=1)", "write key=value"),
        ("users_policies:First(least=2)+(1)", "write key=value"),
        ("users_policies:First(least={[]: 1})", "write key=value"),
        ("users_policies:First(**{})", "write key=value"),
        ("users_policies:Bare", "has no 'act'; derive its class from servegym.envs.Policy"),
        ("users_policies:Policy", "neither a class that can be built"),
    ],
)
def test_what_is_no_policy_is_refused(name: str, message: str) -> None:
    with pytest.raises(ServegymError, match=message) as refusal:
        make_policy(name, "Tiny-v0")
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Illegal", "policy users_policies:Illegal chose illegal action"),
        ("Beyond", "policy users_policies:Beyond: action must lie in 0"),
        ("Texts", "policy users_policies:Texts: action must be a whole number"),
        ("Never", "policy users_policies:Never: unknown value of process.decisions"),
        ("Known", "unknown key in a policy's comparison: 'output_lengths'"),
        ("Known", "policy users_policies:Known: unknown key"),
        ("Listed", "policy users_policies:Listed: comparison must be a table of keys"),
        ("Called", "policy users_policies:Called: comparison must be a table of keys"),
        ("Beside", "policy users_policies:Beside: the plan is for 2 clients"),
        ("Refusing", "policy users_policies:Refusing: too many requests"),
        ("Blind", "policy users_policies:Blind: nothing to see"),
    ],
)
def test_what_it_does_wrong_is_one_line(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--task", "Tiny-v0", "--policies", f"users_policies:{name}", "--seeds", "1000000"]
    with pytest.raises(SystemExit) as stop:
        run(evaluate.main, [*options, "--output", "out"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "|" not in line and line]
    assert stop.value.code == 2
    assert len(lines) == 1, lines
    assert message in lines[0]
