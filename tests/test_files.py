"""Files that users bring: any encoding, line end and damage ends in one line that names the place."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from servegym.envs import load_task
from servegym.envs.errors import ServegymError, shown
from servegym.envs.files import read_json, read_text
from servegym.envs.workload.traces import read_requests

Write = Callable[[str, str], Path]
HEADER = "prompt_tokens,output_tokens\n"

TOML_LINES = [
    # an unknown section is blamed itself, not its first key
    ("[Cluster]\nclients = 3\n", 1),
    ("[cluster]\nclients = 3\n[[workloads]]\nsource = 'tiny'\n", 3),
    # no editor ends a line here
    ("# one\u2028line\n[cluster]\nclients = 0\n", 3),
    ("# one\x85line\n# another\x0bone\n[cluster]\nclients = 0\n".replace("\x0b", "\u2029"), 4),
    ("[cluster]\r\nreplicas = 1\r\nclients = 0\r\n", 3),
    # quotes, dots, blanks and comments
    ("[cluster]\n'clients' = 0\n", 2),
    ('[cluster]\n"a.b" = 0\n', 2),
    ("[workload]\n'source' = 'tiny'\n['cluster'] # why\n  clients=0\n", 4),
    ("cluster . replicas = 1\ncluster . 'clients' = 0\n", 2),
    ("# a\n\n[ cluster ] # clients = 1\n# clients = 0\n\nclients = 0\n", 6),
    ("[workload]\nsource = 'tiny' # [cluster]\n[cluster]\nclients = 0", 4),
    # inside of texts and lists that hold what looks like keys
    ('[process]\nreward = """\n[cluster]\nclients = 0\n"""\n', 2),
    ("[workload]\nsource = '''\nclients = 1\\'''\n[cluster]\nclients = 0\n", 2),
    (
        "[process]\nrules = [ # clients = 0\n  'fcfs', # ]\n  'plan',\n]\n[cluster]\nclients = 0\n",
        7,
    ),
    ("[process]\nrules = [\n  'fcfs',\n  'nobody',\n]\n", 2),
    # sub-tables and what they are called
    (
        "[cost]\nmodel = 'affine'\n[cost.prefill]\nbase = 1\nper_token = 1\n[cost.decode]\nbase = -1\n",
        7,
    ),
    ("[cost]\nmodel = 'affine'\n\ndecode.base = 1\ndecode.per_cliend = 1\n", 5),
    ("[cost]\nmodel = 'affine'\n[cost.decode]\nbase = 1\nper_client = 'x'\n", 5),
    ("[cost]\n[cost.decode]\nbase = 1\n", 1),  # what is missing: model
    ("[cost.engine_overhead]\nbase = 1\nper_client = nan\n", 3),
    ("[cost]\nengine_overhead = {base = 1, per_client = -1}\n", 2),
    ("a = 1\n", 1),
]


@pytest.mark.parametrize(("text", "line"), TOML_LINES)
@pytest.mark.parametrize("before", ["", "\ufeff"])
def test_the_line_of_a_toml_key(write: Write, text: str, line: int, before: str) -> None:
    path = write("bad.toml", before + text)
    with pytest.raises(ServegymError) as error:
        load_task(str(path))
    assert str(error.value).startswith(f"{path}: line {line}: ")
    assert "\n" not in str(error.value)


CSV_LINES = [
    # a quoted field over two lines; the row begins on its first
    (HEADER + '5,"6\n"\n7,0\n', 4),
    (HEADER + '5,6\n"x\ny",7\n', 3),
    ('"prompt_tokens\n","output_tokens"\n5,6\n7,x\n', 4),
    (HEADER + '5,6\n"5\n",6\n5\n', 5),
    # other ends of lines
    ("prompt_tokens,output_tokens\r5,6\r7,0\r", 3),
    ("prompt_tokens,output_tokens\r\n5,6\r\n7,0\r\n", 3),
    (HEADER + "5,6\n7,8\u20289\n", 3),
    (HEADER + "5,6\n7,8\x859\n", 3),
    (HEADER + "5,6\n7,\x00\n", 3),
    # long fields and long numbers
    (HEADER + "5,6\n7," + "9" * 200_000 + "\n", 3),
    (HEADER + "5,6\n7," + "9" * 5_000 + "\n", 3),
    (HEADER + "5,6\n7,1" + "0" * 400 + "\n", 3),
]


@pytest.mark.parametrize(("text", "line"), CSV_LINES)
def test_the_line_of_a_csv_row(write: Write, text: str, line: int) -> None:
    path = write("bad.csv", text)
    with pytest.raises(ServegymError) as error:
        read_requests(path)
    assert str(error.value).startswith(f"{path}: line {line}: ")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + HEADER + "5,6\n",
        "prompt_tokens,output_tokens\r5,6\r",
        ' prompt_tokens , "output_tokens" \n'.replace(' "', '"').replace('" ', '"') + "5,6\n",
        '"prompt_tokens","output_tokens"\n"5"," 6"\n\n\n',
    ],
)
def test_csv_files_that_are_read(write: Write, text: str) -> None:
    requests = read_requests(write("good.csv", text))
    assert (list(requests.prompt_tokens), list(requests.output_tokens)) == ([5], [6])


def test_suffixes_in_capitals(write: Write) -> None:
    write("WORK.CSV", HEADER + "5,6\n")
    task = load_task(str(write("TASK.TOML", "[workload]\nsource = 'WORK.CSV'\n")))
    assert len(read_requests(task.workload.source)) == 1


UNREADABLE = [
    # what is not TOML, and how it is said
    (b"a = " + b"[" * 100_000, "not TOML that can be read: too deep"),
    (b"a = " + b"9" * 100_000, "not TOML that can be read: a number of too many digits"),
    (b"[cluster]\nclients = 0x" + b"f" * 10_000, "line 2: cluster.clients must be a whole number"),
    (b"[cluster]\nclients = 1\n#\xff\n", "line 3: cannot be read as a text in UTF-8"),
    ("[cluster]\n".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
    ("[cluster]\n".encode("utf-32"), "is in UTF-32; save it as UTF-8"),
    (b"[workload]\nsource = " + b"'" + b"x" * 5_000 + b"'\n", "(5002 characters)"),
]


@pytest.mark.parametrize(("data", "words"), UNREADABLE)
def test_what_is_no_task(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(data)
    with pytest.raises(ServegymError) as error:
        load_task(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700


@pytest.fixture
def odd_path(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """A path that is wrong in one of several ways."""
    path = tmp_path / "odd.toml"
    match request.param:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(path)
        case "dangling":
            path.symlink_to(tmp_path / "nowhere")
        case "below a file":
            path.touch()
            return str(path / "task.toml")
        case "long":
            return str(tmp_path / ("x" * 5000 + ".toml"))
        case "NUL":
            return str(tmp_path / "a\0.toml")
    return str(path)


ODD = {
    "folder": "is a folder",
    "pipe": "a device or a pipe",
    "device": "a device or a pipe",
    "loop": "cannot be read: Too many levels",
    "dangling": "no such",
    "below a file": "no such",
    "long": "cannot be read: File name too long",
    "NUL": "is no name of a file",
}


@pytest.mark.parametrize(("odd_path", "words"), list(ODD.items()), indirect=["odd_path"])
@pytest.mark.parametrize(
    "read", [load_task, lambda path: read_requests(path), lambda path: read_json(Path(path))]
)
def test_odd_paths(odd_path: str, words: str, read: Callable[[str], object]) -> None:
    with pytest.raises(ServegymError, match=words) as error:
        read(odd_path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "line 1: not JSON: Expecting value"),
        ("{}\n{}", "line 2: not JSON: Extra data"),
        ("[" * 100_000, "not JSON that can be read: too deep"),
        ("9" * 100_000, "not JSON that can be read: a number of too many digits"),
    ],
)
def test_what_is_no_json(write: Write, text: str, words: str) -> None:
    with pytest.raises(ServegymError, match=words):
        read_json(write("bad.json", text))


def test_texts_lose_their_mark(write: Write) -> None:
    assert read_text(write("a.txt", "\ufeffa\r\nb\rc\u2028")) == "a\nb\nc\u2028"


def test_long_values_are_shown_short() -> None:
    assert shown("x") == "'x'"
    assert len(shown("x" * 10_000)) < 200
    assert shown(16**5000) == "a value of type int that is too long to be shown"


STATEMENTS = [
    # a statement, right and wrong, over one line or several; what its text holds is no statement
    ("cluster.clients = 3 # [b]", "cluster.clients = 0 # [b]"),
    ("'cluster'.max_prefill_tokens = 9", "'cluster'.max_prefill_tokens = [[{p = 1}], []]"),
    ('workload.source = """\\\n\n  tiny"""', 'workload.source = """\n[x]\ny = 1 \\"""\n"""'),
    ("workload . 'requests' = 0x9", "workload . 'requests' = '\\'"),
    (
        "process.rules = [\n  'fcfs', # ]\n]",
        "process.rules = [\n  'fcfs', # ]\n  '[', \"]\\\"\",\n]",
    ),
    ("process.decisions = '''\nevents'''", "process.decisions = '''\n\\'''''"),
    ('information.output_lengths = """known"""', 'information.output_lengths = """a"""""'),
    ("information.'compare_by' = 'mean'", 'information.compare_by = """\n\\\n\n#"""'),
    ("information.quantile = 0.5", "information.quantile = ''"),
    ("process.max_decisions = 7", 'process."max.decisions" = 7'),
    (
        "cost = {model = 'affine', decode = {base = 1}, prefill = {base = 1, per_token = 1}}",
        "cost = {e = '}', f = \"#\"}",
    ),
    ("", '"h.i" = "\\\\"'),
    ("#", "m.n.'o' = [\n[{p = 1}], []]"),
]


def test_statements_in_any_order(write: Write, rng: np.random.Generator) -> None:
    """One statement is wrong, in texts put together at random: its first line is named."""
    for _ in range(300):
        wrong = int(rng.integers(len(STATEMENTS)))
        text, line = "", 0
        for k in rng.permutation(len(STATEMENTS)):
            text += "".join(("", "# a = [\n", "\n")[: int(rng.integers(3)) + 1])
            line = text.count("\n") + 1 if k == wrong else line
            text += STATEMENTS[k][int(k == wrong)] + "\n"
        path = write("any.toml", text)
        with pytest.raises(ServegymError) as error:
            load_task(str(path))
        assert str(error.value).startswith(f"{path}: line {line}: "), text


def test_the_right_statements_are_a_task(write: Write) -> None:
    task = load_task(str(write("all.toml", "\n".join(right for right, _ in STATEMENTS))))
    assert (task.cluster.clients, task.workload.source, task.process.rules) == (
        3,
        "tiny",
        ("fcfs",),
    )
