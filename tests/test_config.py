"""Task files: every key but those of [cost], what it refuses, and where the message points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from servegym.envs import TASKS, ServegymError, ServingEnv, TaskConfig, load_task
from servegym.envs.machine.costs import AffineDecode, AffinePrefill, StageCosts
from servegym.envs.task.cluster import ClusterConfig
from servegym.envs.task.config import with_overrides
from servegym.envs.task.sections import InformationConfig, ProcessConfig, WorkloadConfig
from servegym.envs.task.slo import SloConfig
from servegym.envs.vocabulary import USUAL_RULES
from tests.helpers import HUGE

Write = Callable[[str, str], Path]

# Section, key, a value that is refused, a word of the message, and a legal neighbour.
BAD_VALUES = [
    # whole numbers in a range
    ("cluster", "clients", "0", "1 … 1000000, got 0", "1"),
    ("cluster", "clients", "-5", "1 … 1000000", "5"),
    ("cluster", "clients", "1_000_001", "1 … 1000000", "1_000_000"),
    ("cluster", "clients", HUGE, "1 … 1000000", "1000"),
    ("cluster", "replicas", "0", "1 … 4096, got 0", "1"),
    ("cluster", "replicas", "4097", "1 … 4096, got 4097", "4096"),
    ("cluster", "kv_capacity_tokens", "-1", "0 … 1000000000000, got -1", "0"),
    ("cluster", "kv_block_tokens", "0", "1 … 65536, got 0", "1"),
    ("cluster", "chunk_tokens", "-1", "0 … 1000000000000, got -1", "1"),
    ("cluster", "max_prefill_tokens", "-1", "0 … 1000000000000", "0"),
    ("cluster", "max_prefill_tokens", "1_000_000_000_001", "0 …", "1_000_000_000_000"),
    ("workload", "requests", "0", "1 … 10000000", "1"),
    ("workload", "requests", "10_000_001", "1 … 10000000", "10_000_000"),
    ("process", "max_decisions", "-1", "0 … 1000000000000", "0"),
    ("process", "max_decisions", "1_000_000_000_001", "0 …", "1_000_000_000_000"),
    # something else than a whole number
    ("cluster", "clients", "true", "a whole number, got True", "1"),
    ("cluster", "clients", "5.0", "a whole number, got 5.0", "5"),
    ("cluster", "clients", "nan", "a whole number, got nan", "5"),
    ("cluster", "clients", '"5"', "a whole number, got '5'", "5"),
    ("cluster", "clients", "[5]", "a whole number, got [5]", "5"),
    ("cluster", "clients", "2020-01-01", "a whole number", "2020"),
    ("process", "max_decisions", "false", "a whole number, got False", "0"),
    # numbers
    ("workload", "arrival_rate_per_s", "-0.1", "0 or lie in 1.733e-06 … 1e+09 for 1319", "0.0"),
    ("workload", "arrival_rate_per_s", "nan", "within 1e+09 s, got nan", "0"),
    ("workload", "arrival_rate_per_s", "inf", "within 1e+09 s, got inf", "1e9"),
    ("workload", "arrival_rate_per_s", "true", "a number, got True", "1"),
    ("workload", "arrival_rate_per_s", '"fast"', "a number, got 'fast'", "7"),
    ("process", "pads", "[-1]", "must lie in 0 … 1e12", "[]"),
    ("process", "max_seconds", "-1", "≥ 0, got -1.0", "0"),
    ("process", "max_seconds", "nan", "≥ 0, got nan", "0.5"),
    ("process", "max_seconds", "inf", "≥ 0, got inf", "1e300"),
    ("process", "max_seconds", "true", "a number, got True", "1"),
    ("cluster", "watermark", "1", "≥ 0 and < 1, got 1.0", "0.999"),
    ("cluster", "watermark", "-0.1", "≥ 0 and < 1, got -0.1", "0"),
    ("cluster", "watermark", "nan", "≥ 0 and < 1, got nan", "0.5"),
    ("cluster", "staleness_s", "-1", "0 … 1e9, got -1.0", "0"),
    ("cluster", "staleness_s", "nan", "0 … 1e9, got nan", "1e9"),
    ("cluster", "conservativeness", "-0.1", "0 … 100, got -0.1", "0"),
    ("cluster", "patience_s", "-0.1", "0 … 1e9, got -0.1", "0"),
    ("cluster", "patience_s", "1e10", "0 … 1e9, got 10000000000.0", "1e9"),
    ("cluster", "steal_share", '"third"', "cluster.steal_share", '"half"'),
    ("cluster", "migrate", '"freenes"', "did you mean 'freeness'", '"freeness"'),
    ("cluster", "steal_period_s", "-1", "0 … 1e9, got -1.0", "0"),
    ("cluster", "steal_period_s", "nan", "0 … 1e9, got nan", "1e9"),
    ("cluster", "freeness_steps", "-0.5", "0 … 1e9, got -0.5", "0"),
    ("cluster", "shed_at", "-0.1", "0 … 1e6, got -0.1", "0.1"),
    ("cluster", "shed_at", "inf", "0 … 1e6, got inf", "1e6"),
    ("cluster", "conservativeness", "101", "0 … 100, got 101.0", "100"),
    ("cluster", "level_tokens", "0", "1 … 1000000, got 0", "1"),
    ("cluster", "shortest_by", '"promt"', "did you mean 'prompt'?", '"prompt"'),
    ("information", "expect", '"uper"', "did you mean 'upper'?", '"upper"'),
    ("information", "interval", "0", "between 0 and 1, got 0.0", "1e-9"),
    ("information", "interval", "1", "between 0 and 1, got 1.0", "0.999999"),
    ("slo", "classes", "{chat = 1.0}", "must be a list", "[]"),
    # tables (tests/test_arrivals.py, tests/test_trace_windows.py)
    ("workload", "arrivals", "2.0", "must be a table of keys, got 2.0", "{rate_per_s = 2.0}"),
    ("workload", "trace", "{max_requests = 5}", "trace is for files", "{max_requests = 0}"),
    # texts
    ("workload", "source", "5", "a text, got 5", '"tiny"'),
    ("workload", "source", '"gsm8k-cap51"', "did you mean 'gsm8k-cap512'?", '"gsm8k-cap512"'),
    ("workload", "source", '"mine.txt"', "neither a preset nor a .csv, ", '"mine.csv"'),
    ("process", "reward", '"latancy"', "did you mean 'latency'?", '"latency"'),
    ("process", "reward", "1", "a text, got 1", '"gap"'),
    # one of a few
    ("cluster", "router", '"least-request"', "did you mean 'least-requests'?", '"least-requests"'),
    ("cluster", "router", "1", "a text, got 1", '"pool"'),
    ("cluster", "preempt", '"newst"', "did you mean 'newest'?", '"fewest-output"'),
    ("cluster", "admission_guard", '"ful"', "did you mean 'full'?", '"peak"'),
    ("cluster", "mixed", '"one_pass"', "did you mean 'one-pass'?", '"sum"'),
    ("information", "output_lengths", '"knwon"', "did you mean 'known'?", '"known"'),
    ("information", "output_lengths", "1", "choose from known", '"known"'),
    ("information", "output_lengths", '"predictd"', "did you mean 'predicted'?", '"predicted"'),
    ("information", "predictor", '"bert-5clas"', "did you mean 'bert-5class'?", '"bert-5class"'),
    ("information", "predictor", "5", "a text, got 5", '"column"'),
    ("information", "kendall_tau", "-0.01", "0 … 1, got -0.01", "0"),
    ("information", "kendall_tau", "1.01", "0 … 1, got 1.01", "1"),
    ("information", "kendall_tau", "nan", "0 … 1, got nan", "0.5"),
    ("information", "kendall_tau", '"high"', "a number, got 'high'", "0.69"),
    ("information", "compare_by", '"mean_sd"', "did you mean 'mean-sd'?", '"mean-sd"'),
    ("information", "compare_by", "true", "a text, got True", '"quantile"'),
    ("information", "quantile", "0", "between 0 and 1, got 0.0", "1e-9"),
    ("information", "quantile", "1", "between 0 and 1, got 1.0", "0.999999"),
    ("information", "quantile", "nan", "between 0 and 1, got nan", "0.5"),
    ("information", "deviations", "-0.1", "0 … 100, got -0.1", "0"),
    ("information", "deviations", "101", "0 … 100, got 101.0", "100"),
    ("process", "decisions", '"round"', "did you mean 'rounds'?", '"rounds"'),
    ("process", "decisions", "true", "choose from events, rounds", '"events"'),
    ("cluster", "steal_order", '"longst"', "did you mean 'longest'?", '"oldest"'),
    ("cluster", "steal_delay_s", "-1", "0 … 1e6, got -1.0", "1"),
    ("cluster", "move", '"copi"', "did you mean 'copy'?", '"cheaper"'),
    ("cluster", "kv_bytes_per_token", "-1", "in 0 … 1000000000, got -1", "131072"),
    ("cluster", "link", '"nvlnk"', "did you mean 'nvlink'?", '"tcp"'),
    ("cluster", "link", "{bytes_per_s = 0}", "must be > 0", "{bytes_per_s = 1e9}"),
    ("cluster", "host_link", '"pcie6"', "did you mean 'pcie5'?", "{latency_s = 0.001}"),
    ("cluster", "evict", '"hots"', "did you mean 'host'?", '"host"'),
    # lists
    ("process", "steals", '["waitng"]', "did you mean 'waiting'?", "[]"),
    ("process", "caps", "[0.5]", "must hold 1", "[0.5, 1.0]"),
    ("process", "reserves", "[0.5]", "must hold 0", "[0.0, 0.5]"),
    ("cluster", "replica", "5", "cluster.replica must be a list, got 5", "[{}]"),
    ("cluster", "replica", "[5]", "cluster.replica[0] must be a table of keys", "[{}]"),
    ("cluster", "replica", "[{}, {}]", "replicas is 1, but there are 2 tables", "[]"),
    ("process", "mixed_rules", "[]", "at least one rule, each once", '["fcfs"]'),
    ("process", "mixed_rules", '["fcsf"]', "did you mean 'fcfs'?", '["longest"]'),
    ("process", "observe", "[]", "at least one block, each once", '["memory"]'),
    ("process", "observe", '["memry"]', "did you mean 'memory'?", '["cluster", "replica"]'),
    ("process", "rules", '"fcfs"', "a list, got 'fcfs'", '["fcfs"]'),
    ("process", "rules", "[]", "at least one rule, each once", '["fcfs"]'),
    ("process", "rules", '["fcfs", "fcfs"]', "each once", '["fcfs", "plan"]'),
    ("process", "rules", '["fcsf"]', "did you mean 'fcfs'?", '["fcfs"]'),
    ("process", "rules", '["fcfs", 3]', "process.rules[1] must be a text, got 3", '["fcfs"]'),
    # limits
    ("slo", "ttft_s", "0", "> 0 seconds, got 0.0; leave it out for no limit", "1e-9"),
    ("slo", "ttft_s", "-1.5", "> 0 seconds, got -1.5", "inf"),
    ("slo", "tpot_s", "nan", "> 0 seconds, got nan", "0.05"),
    ("slo", "tpot_s", "true", "slo.tpot_s must be a number, got True", "1"),
]


@pytest.mark.parametrize(("section", "key", "bad", "words", "good"), BAD_VALUES)
def test_bad_value(write: Write, section: str, key: str, bad: str, words: str, good: str) -> None:
    text = f"# A task.\n\n[{section}]\n# {key} = 0\n{key} = {{}}\n\n# The end.\n"
    path = write("bad.toml", text.format(bad))
    with pytest.raises(ServegymError) as error:
        load_task(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}: line 5: ")
    assert words in message
    assert "\n" not in message
    load_task(str(write("good.toml", text.format(good))))


def test_every_key_is_in_the_table_of_bad_values() -> None:
    sections = {
        "cluster": ClusterConfig,
        "workload": WorkloadConfig,
        "information": InformationConfig,
        "process": ProcessConfig,
        "slo": SloConfig,
    }
    keys = {(section, item.name) for section, cls in sections.items() for item in fields(cls)}
    assert keys == {(section, key) for section, key, *_ in BAD_VALUES}
    assert {item.name for item in fields(TaskConfig)} == {"name", "cost", *sections}


BAD_NAMES = [
    # the file, where the message points, what it says
    ("[clutser]\nclients = 5\n", "unknown section 'clutser'; did you mean 'cluster'?"),
    ("[cluster]\nclint = 5\n", "unknown key 'cluster.clint'; did you mean 'cluster.clients'?"),
    ("clients = 5\n", "unknown section 'clients'; choose from "),
    ("cluster = 5\n", "cluster must be a table of keys, got 5"),
    ("[[cluster]]\nclients = 5\n", "cluster must be a table of keys, got [{'clients': 5}]"),
    ("cluster.clint = 5\n", "unknown key 'cluster.clint'"),
    ('[cost]\nprset = "tiny"\n', "unknown key 'cost.prset'; did you mean 'cost.preset'?"),
    ('[cost]\npreset = "tyni"\n', "unknown cost preset 'tyni'; did you mean 'tiny'?"),
    ('[cost]\nmodel = "afine"\n', "unknown cost model 'afine'; did you mean 'affine'?"),
]


@pytest.mark.parametrize(("text", "words"), BAD_NAMES)
def test_unknown_name(write: Write, text: str, words: str) -> None:
    """The nearest valid name is in the message. No file holds more than two lines to point at."""
    path = write("bad.toml", text)
    with pytest.raises(ServegymError) as error:
        load_task(str(path))
    assert str(error.value).startswith((f"{path}: line 1: {words}", f"{path}: line 2: {words}"))


def test_unknown_section_without_keys(write: Write) -> None:
    with pytest.raises(ServegymError, match="clutser"):
        load_task(str(write("bad.toml", "[clutser]\n")))


LINES = [
    # found as a key of its section, whatever surrounds it
    ("[cluster]\nreplicas = 1\nclients = 0\n", 3),
    ("[ cluster ]\n  clients = 0 # idle\n", 2),
    ("cluster.clients = 0\n", 1),
    ("\n\ncluster = {clients = 0}\n", 3),
    ('[workload]\nrequests = 5\n\n[cluster]\n"clients" = 0\n', 5),
    ("[process]\nmax_decisions = 5\nrules = [\n    'fcfs',\n    'nobody',\n]\n", 3),
    ("[workload]\nrequests = 5\n[cluster]\n# clients = 1\nclients = 0\n", 5),
]


@pytest.mark.parametrize(("text", "line"), LINES)
def test_message_names_the_line(write: Write, text: str, line: int) -> None:
    path = write("bad.toml", text)
    with pytest.raises(ServegymError, match=f": line {line}: "):
        load_task(str(path))


BAD_FILES = [
    ("[cluster\n", "not TOML: .* line 1"),
    ("[cluster]\nclients = 5\nclients = 6\n", "not TOML: .* line 3"),
    ("[cluster]\nclients = \n", "not TOML: .* line 2"),
]


@pytest.mark.parametrize(("text", "words"), BAD_FILES)
def test_not_toml(write: Write, text: str, words: str) -> None:
    with pytest.raises(ServegymError, match=words):
        load_task(str(write("bad.toml", text)))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ServegymError, match=r"none\.toml: no such task file"):
        load_task(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ServegymError, match=r"folder\.toml: cannot be read"):
        load_task(str(tmp_path / "folder.toml"))
    (tmp_path / "picture.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ServegymError, match=r"picture\.toml: is in UTF-16; save it as UTF-8"):
        load_task(str(tmp_path / "picture.toml"))


TASK_NAMES = [
    ("Tiny-v1", "unknown task 'Tiny-v1'; did you mean 'Tiny-v0'? (a task file ends in .toml)"),
    ("servegym/Papre-v0", "unknown task 'Papre-v0'; did you mean 'Paper-v0'?"),
    ("", "unknown task ''; choose from Tiny-v0, "),
]


@pytest.mark.parametrize(("name", "words"), TASK_NAMES)
def test_unknown_task(name: str, words: str) -> None:
    with pytest.raises(ServegymError) as error:
        load_task(name)
    assert str(error.value).startswith(words)


@pytest.mark.parametrize("name", TASKS)
def test_known_task(name: str) -> None:
    assert load_task(name) is load_task(name.removeprefix("servegym/")) is TASKS[name]


# ---- a whole task ---------------------------------------------------------------------------

EXAMPLE = """
[cluster]
replicas = 1
clients = 200
kv_capacity_tokens = 0            # 0: not limiting
max_prefill_tokens = 0            # token budget of one prefill stage; 0: none
[cost]                            # seconds
model = "affine"                  # affine | table | levelled
decode  = {base = 0.0389, per_client = 5.01e-5, per_kv_token = 5.94e-8}
prefill = {base = 0.02787, per_token = 1.704e-4, per_token_squared = 4.826e-9, floor = 0.0374}
[workload]
source = "gsm8k-lognormal"        # a preset or a path
requests = 1319                   # for presets
[information]
output_lengths = "known"
"""


def test_the_example_of_the_design(write: Write) -> None:
    path = write("task.toml", EXAMPLE)
    decode = AffineDecode(0.0389, 5.01e-5, 5.94e-8)
    costs = StageCosts(decode, AffinePrefill(0.02787, 1.704e-4, 4.826e-9, 0.0374))
    assert load_task(str(path)) == TaskConfig(name=str(path), cost=costs)


def test_an_empty_file_is_the_default_task(write: Write) -> None:
    path = write("task.toml", "")
    assert load_task(str(path)) == TaskConfig(name=str(path))
    assert TaskConfig(name="servegym/GSM8K-v0") == TASKS["servegym/GSM8K-v0"]


def test_workload_file_is_looked_up_beside_the_task(write: Write) -> None:
    write("mine.csv", "prompt_tokens,output_tokens\n5,6\n")
    path = write("task.toml", '[workload]\nsource = "mine.csv"\n[cluster]\nclients = 1\n')
    env = ServingEnv(str(path))
    env.reset()
    assert env.records().prompt_tokens.tolist() == [5]


def test_an_absolute_workload_path_stays(write: Write) -> None:
    csv = write("mine.csv", "prompt_tokens,output_tokens\n5,6\n")
    path = write("task.toml", f'[workload]\nsource = "{csv}"\n')
    assert load_task(str(path)).workload.source == str(csv)


def test_overrides_replace_single_keys() -> None:
    task = with_overrides(TASKS["servegym/Tiny-v0"], {"cluster": {"clients": 2}})
    assert task.cluster == ClusterConfig(clients=2)
    assert task.workload == TASKS["servegym/Tiny-v0"].workload
    assert with_overrides(task, {}) == task


OVERRIDES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"cluster": {"client": 2}}, "did you mean 'cluster.clients'?", {"cluster": {"clients": 2}}),
    ({"clutser": {}}, "did you mean 'cluster'?", {"cluster": {}}),
    ({"cluster": 2}, "cluster must be a table of keys, got 2", {"cluster": {"clients": 2}}),
    ({"cluster": {"clients": True}}, "a whole number", {"cluster": {"clients": 1}}),
    ({"process": {"rules": "fcfs"}}, "a list", {"process": {"rules": ("fcfs",)}}),
    ({"cost": {"preset": "tyni"}}, "did you mean 'tiny'?", {"cost": {"preset": "tiny"}}),
]


@pytest.mark.parametrize(("bad", "words", "good"), OVERRIDES)
def test_bad_overrides(bad: dict[str, Any], words: str, good: dict[str, Any]) -> None:
    with pytest.raises(ServegymError) as error:
        ServingEnv("Tiny-v0", overrides=bad)
    assert words in str(error.value)
    ServingEnv("Tiny-v0", overrides=good)


def test_all_rules_are_on_offer_by_default() -> None:
    assert ProcessConfig().rules == USUAL_RULES


# Built in Python, without a file: the field, a value that is refused, a legal neighbour.
BAD_FIELDS: list[tuple[type, str, Any, Any]] = [
    (ClusterConfig, "clients", 2.5, 2),
    (ClusterConfig, "clients", True, 1),
    (ClusterConfig, "clients", "5", 5),
    (WorkloadConfig, "requests", 2.5, 2),
    (InformationConfig, "output_lengths", "guessed", "known"),
    (ProcessConfig, "decisions", "round", "rounds"),  # would be taken for "events"
    (ProcessConfig, "max_decisions", 1.5, 1),
    (ProcessConfig, "max_seconds", "5", 5.0),
]


@pytest.mark.parametrize(("make", "name", "bad", "good"), BAD_FIELDS)
def test_bad_field(make: type, name: str, bad: Any, good: Any) -> None:
    assert getattr(make(**{name: good}), name) == good
    with pytest.raises(ServegymError, match=name):
        make(**{name: bad})
