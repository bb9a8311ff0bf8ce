"""Published traces: each format as it is published, what is dropped of it, what is refused."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from servegym.envs import read_requests, read_trace
from servegym.envs.workload.formats import FORMATS
from servegym.envs.workload.traces import Trace
from tests.helpers import refused

Write = Callable[[str, str], Path]

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
BURST_2 = (
    "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
)
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
LENGTHS = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n"
MOONCAKE = '{{"timestamp": {}, "input_length": {}, "output_length": {}, "hash_ids": [46, 47]}}\n'


def mooncake(*rows: tuple[Any, Any, Any]) -> str:
    return "".join(MOONCAKE.format(*row) for row in rows)


# Name, text, format; all hold prompts 70, 55, 90 and outputs 3, 1, 4; arrivals at 0, 1.5 and 3 s or none.
PUBLISHED: list[tuple[str, str, str, bool]] = [
    ("azure_2023.csv",
     AZURE + "2023-11-16 18:15:46.6805900,70,3\r\n2023-11-16 18:15:48.1805900,55,1\r\n"
     "2023-11-16 18:15:49.6805900,90,4", "azure", True),
    # a whole second has no fraction
    ("azure_2024.csv",
     AZURE + "2024-05-10 00:00:00+00:00,70,3\n2024-05-10 00:00:01.500000+00:00,55,1\n"
     "2024-05-10 00:00:03+00:00,90,4\n", "azure", True),
    ("azure_2025.csv",
     AZURE.replace("Co", "NumImages,Co") + "2024-10-15 00:00:00,2,70,3\n"
     "2024-10-15 00:00:01.5,0,55,1\n2024-10-15 00:00:03,1,90,4\n", "azure", True),
    ("BurstGPT_1.csv",
     BURST + "5,ChatGPT,70,3,73,Conversation log\n6.5,GPT-4,55,1,56,API log\n"
     "8,ChatGPT,90,4,94,Conversation log\n", "burstgpt", True),
    ("BurstGPT_3.csv",
     BURST_2 + "19440110.0,1722ac82,43,GPT-4,70,3,73,Conversation log\n"
     "19440111.5,,2,ChatGPT,55,1,56,API log\n19440113.0,a5c6,8,GPT-4,90,4,94,API log\n",
     "burstgpt", True),
    ("conversation_trace.jsonl", mooncake((27, 70, 3), (1527, 55, 1), (3027, 90, 4)), "mooncake", True),
    ("trace_d.jsonl",
     "".join(f'{{"request_id": {k}, "type": "text", "input_length": {p}, "output_length": {o}}}\n'
             for k, (p, o) in enumerate([(70, 3), (55, 1), (90, 4)])), "mooncake", False),
    ("splitwise_conv.csv", VIDUR + "0.0,70,3\n1.5,55,1\n3.0,90,4\n", "vidur", True),
    ("twice.csv", "x,x," + VIDUR + ",1,0.0,70,3\n,1,1.5,55,1\n,1,3.0,90,4\n", "vidur", True),
    ("arxiv.csv", LENGTHS + "70,3,73,23.3\n55,1,56,55.0\n90,4,94,22.5\n", "vidur", False),
    ("sharegpt.jsonl",
     "".join(f'{{"input_toks": {p}, "output_toks": {o}, "arrival_time_ns": {t}, "input_tok_ids": [1]}}\n'
             for t, p, o in [(500, 70, 3), (1500000500, 55, 1), (3000000500, 90, 4)]),
     "llmservingsim", True),
    ("lengths.csv", "prompt_len,output_len\n70,3\n55,1\n90,4\n", "lengths", False),
    ("lengths.json", json.dumps([{"prompt_len": 70, "output_len": 3, "arrival_time": 2},
                                 {"prompt_len": 55, "output_len": 1, "arrival_time": 3.5},
                                 {"prompt_len": "90", "output_len": 4.0, "arrival_time": "5"}]),
     "lengths", True),
    ("own.csv", "prompt_tokens,output_tokens,arrival_s\n70,3,0\n55,1,1.5\n90,4,3\n", "servegym", True),
    ("own.jsonl", "\n\n".join(json.dumps({"prompt_tokens": p, "output_tokens": o})
                               for p, o in [(70, 3), (55, 1), (90, 4)]), "servegym", False),
]  # fmt: skip


def check_three(trace: Trace, form: str, arrives: bool) -> None:
    assert trace.form == form
    assert trace.arrives == arrives
    assert trace.read == 3
    assert not any(trace.dropped.values())
    requests = trace.requests
    assert requests.prompt_tokens.tolist() == [70, 55, 90]
    assert requests.output_tokens.tolist() == [3, 1, 4]
    assert requests.arrival_s.tolist() == pytest.approx([0, 1.5, 3] if arrives else [0, 0, 0])
    assert requests.rows is None


@pytest.mark.parametrize(("name", "text", "form", "arrives"), PUBLISHED)
def test_as_published(write: Write, name: str, text: str, form: str, arrives: bool) -> None:
    check_three(read_trace(write(name, text)), form, arrives)


@pytest.mark.parametrize(("name", "text", "form", "arrives"), PUBLISHED)
def test_gzipped_with_a_mark_and_windows_lines(
    tmp_path: Path, name: str, text: str, form: str, arrives: bool
) -> None:
    lines = text.replace("\r\n", "\n").replace("\n", "\r\n") + "\r\n\r\n"
    half = len(lines) // 2
    members = [gzip.compress(part.encode()) for part in ("\ufeff" + lines[:half], lines[half:])]
    path = tmp_path / f"{name.upper()}.gz"
    path.write_bytes(b"".join(members) + b"\0" * 8)  # as two members, padded
    check_three(read_trace(path), form, arrives)


def test_every_format_is_tried() -> None:
    assert {form for _, _, form, _ in PUBLISHED} == set(FORMATS)


# Rows that are dropped, and what is said of them; row 0 and the last one stay.
DROPPED = [
    ("a.csv", AZURE + "2024-05-10 00:00:00,7,1\n2024-05-10 00:00:01,0,5\n2024-05-10 00:00:02,5,0\n"
     "2024-05-10 00:00:03,7,1\n", "2 of zero tokens"),
    ("b.csv", BURST + "5,GPT-4,7,1,8,log\n6,GPT-4,7,0,7,log\n7,GPT-4,7,1,8,log\n", "1 of zero tokens"),
    # holes: an empty cell, a word for none, a row that ends early, a blank line
    ("c.csv", AZURE + "2024-05-10 00:00:00,7,1\n2024-05-10 00:00:01,,5\n,5,5\nnan,5,5\n"
     "2024-05-10 00:00:01,5\n\n2024-05-10 00:00:03,7,1\n", "5 with a value missing"),
    ("d.csv", VIDUR + "0,7,1\n1,NaN,1\n,5,5\n3,7,1\n", "2 with a value missing"),
    ("e.csv", VIDUR + '0,7,1\n"1",,1\n"2"\n3,"7",1\n', "2 with a value missing"),
    ("f.jsonl", mooncake((0, 7, 1), ("null", 7, 1), (2, "NaN", 1), (3, 7, 1)), "2 with a value missing"),
    ("g.jsonl", mooncake((0, 7, 1)) + '{"timestamp": 5}\n' + mooncake((3, 0, 1), (3000, 7, 1)),
     "1 of zero tokens, 1 with a value missing"),
    ("h.jsonl", '{"input_length": 7, "timestamp": 0}\n' + mooncake((0, 7, 1), (3000, 7, 1)),
     "1 with a value missing"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "words"), DROPPED)
def test_rows_that_are_no_request_are_dropped_and_counted(
    write: Write, name: str, text: str, words: str
) -> None:
    trace = read_trace(write(name, text))
    assert trace.requests.prompt_tokens.tolist() == [7, 7]
    assert trace.summary().endswith(f"; dropped: {words}")
    assert trace.read == 2 + sum(trace.dropped.values())
    assert trace.requests.rows is not None
    last = trace.read - 1
    assert trace.requests.rows.tolist() in ([0, last], [1, last])


def test_nothing_but_dropped_rows_is_refused(write: Write) -> None:
    path = write("a.csv", BURST + "5,GPT-4,7,0,7,log\n6,GPT-4,,1,7,log\n")
    words = f"{path}: none of its 2 rows is a request: 1 of zero tokens, 1 with a value missing"
    refused(lambda: read_trace(path), words)


ORDERS = [
    ("a.csv", VIDUR + "3.5,1,11\n1,2,12\n1.0,3,13\n0,4,14\n"),
    # the zones differ: 09:00 at +02:00 is 07:00 at UTC
    ("b.csv", AZURE + "2024-05-10 09:00:03.5+02:00,1,11\n2024-05-10 07:00:01+00:00,2,12\n"
     "2024-05-10T08:00:01+0100,3,13\n2024-05-10 07:00:00Z,4,14\n"),
    ("c.jsonl", mooncake((3500, 1, 11), (1000, 2, 12), (1000, 3, 13), (0, 4, 14))),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text"), ORDERS)
def test_rows_are_sorted_and_equal_times_keep_their_order(
    write: Write, name: str, text: str
) -> None:
    requests = read_requests(write(name, text))
    assert requests.arrival_s.tolist() == [0, 1, 1, 3.5]
    assert requests.prompt_tokens.tolist() == [4, 2, 3, 1]
    assert requests.rows is not None
    assert requests.rows.tolist() == [3, 1, 2, 0]


FIRST = "2024-05-10 00:00:00,7,1\n"
ZONED = "2024-05-10 00:00:00+00:00,7,1\n"
# A file that is refused, where and why, and the nearest one that is legal.
BAD_TRACES: list[tuple[str, str, str, str]] = [
    # wrong columns
    ("a.csv", "TIMESTAMP,ContextTokens,Generated\n" + FIRST,
     "line 1: column 'GeneratedTokens' is missing; azure has ContextTokens", AZURE + FIRST),
    ("a.csv", "TIMESTAMPS,ContextTokens,GeneratedTokens\n" + FIRST,
     "line 1: column 'TIMESTAMP' is missing", AZURE + FIRST),
    ("a.csv", BURST.replace("Timestamp", "Time") + "5,G,7,1,8,x\n", "line 1: column 'Timestamp' is missing",
     BURST + "5,G,7,1,8,x\n"),
    ("a.csv", "num_prefill_tokens,arrived_at\n7,1\n", "line 1: column 'num_decode_tokens' is missing",
     "num_prefill_tokens,num_decode_tokens\n7,1\n"),
    ("a.csv", "ContextTokens,GeneratedTokens,prompt_tokens,output_tokens\n7,1,7,1\n",
     "line 1: columns of both servegym and azure", "prompt_tokens,output_tokens\n7,1\n"),
    ("a.csv", "arrived_at," + VIDUR + "0,0,7,1\n", "line 1: column 'arrived_at' stands there twice",
     VIDUR + "0,7,1"),
    ("a.csv", VIDUR.replace(",", ";") + "0;7;1\n", "line 1: uses ';' between fields", VIDUR + "0,7,1"),
    ("a.csv", AZURE, "the file has a header but no request", AZURE + FIRST),
    ("a.csv", "7,1\n9,1\n", "line 1: column 'prompt_tokens' is missing", "prompt_len,output_len\n7,1\n"),
    # values
    ("a.csv", AZURE + FIRST + "2024-05-10 00:00:01,many,1\n",
     "line 3: ContextTokens must be a whole number in 0 … 10000000, got 'many'", AZURE + FIRST),
    ("a.csv", VIDUR + "0,7,1\n\n1,-7,1\n", "line 4: num_prefill_tokens must be", VIDUR + "0,7,1\n"),
    ("a.csv", VIDUR + "0,7.5,1\n", "line 2: num_prefill_tokens must be", VIDUR + "0,7.0,1\n"),
    ("a.csv", VIDUR + "0,7,1e8\n", "line 2: num_decode_tokens must be", VIDUR + "0,7,1e7\n"),
    ("a.csv", VIDUR + "0,7,inf\n", "line 2: num_decode_tokens must be", VIDUR + "0,7,1\n"),
    ("a.csv", VIDUR + "soon,7,1\n", "line 2: arrived_at must be a number, got 'soon'", VIDUR + "9,7,1"),
    ("a.csv", VIDUR + "inf,7,1\n", "line 2: arrived_at must be a number", VIDUR + "1e300,7,1"),
    ("a.csv", VIDUR + "0,7,1\n2e9,7,1\n", "line 3: arrived_at lies 2e+09 s after the first",
     VIDUR + "1e9,7,1\n2e9,7,1\n"),
    ("a.csv", VIDUR + "0,7,1\n1,7,1,9\n", "line 3: 4 fields where the header has 3", VIDUR + "0,7,1\n"),
    ("a.csv", VIDUR + '0,"7",1\n1,7,1,9\n', "line 3: 4 fields where the header", VIDUR + '0,"7",1\n'),
    ("a.csv", '"arrived_at,x",num_prefill_tokens"\n0,7\n', "line 1: column 'num_decode_tokens' is",
     '"arrived_at","num_prefill_tokens","num_decode_tokens","a,b"\n"0","7","1","2"\n'),
    ("a.csv", VIDUR + '0,"7,1\n', "line 2: not a CSV file", VIDUR + '0,"7",1\n'),
    # dates
    ("a.csv", AZURE + FIRST + "tomorrow,7,1\n", "line 3: TIMESTAMP must be a date and time", AZURE + FIRST),
    ("a.csv", AZURE + "05/10/2024 00:00,7,1\n", "line 2: TIMESTAMP must be a date and time", AZURE + FIRST),
    ("a.csv", AZURE + "0.25,7,1\n", "line 2: TIMESTAMP must be a date", AZURE + FIRST),
    ("a.csv", AZURE + ZONED + FIRST, "line 3: TIMESTAMP must be a date with a zone, as the rows before",
     AZURE + ZONED + ZONED),
    ("a.csv", AZURE + FIRST + FIRST + ZONED, "line 4: TIMESTAMP must be a date without a zone",
     AZURE + FIRST + FIRST),
    ("a.csv", AZURE + FIRST + "2061-05-10,7,1\n", "line 3: TIMESTAMP lies 1.17e+09 s after the first",
     AZURE + FIRST + "2025-05-10,7,1\n"),
    # JSON
    ("a.jsonl", mooncake((0, 7, 1)) + '{"timestamp": 5, "inp', "line 2: not JSON", mooncake((0, 7, 1))),
    ("a.jsonl", mooncake((0, 7, 1)) + "[1, 2]\n", "line 2: must be an object", mooncake((0, 7, 1))),
    ("a.jsonl", mooncake((0, 7, 1)) + '\n{"num_prefill_tokens": 7, "num_decode_tokens": 1}\n',
     "line 3: columns of vidur in a file of mooncake", mooncake((0, 7, 1))),
    ("a.jsonl", mooncake((0, 7, "true")), "line 1: output_length must be", mooncake((0, 7, 1))),
    ("a.jsonl", mooncake((0, 7, "[1]")), "line 1: output_length must be", mooncake((0, 7, '"1"'))),
    ("a.jsonl", mooncake((0, 7, "1" + "0" * 400)), "line 1: output_length must", mooncake((0, 7, 1))),
    ("a.jsonl", mooncake(('"2024-05-10"', 7, 1)), "line 1: timestamp must be a number", mooncake((0, 7, 1))),
    ("a.jsonl", '{"input_length": 7}\n', "line 1: column 'output_length' is missing", mooncake((0, 7, 1))),
    ("a.json", '[{"conversations": []}]', "entry 1: holds texts, not token counts",
     '[{"prompt_tokens": 7, "output_tokens": 1}]'),
    ("a.json", '[{"tokens": 7}]', "has none of the keys ContextTokens",
     '[{"prompt_tokens": 7, "output_tokens": 1}]'),
    ("a.json", '[{"prompt_tokens": 7, "output_tokens": 0}]', "entry 1: output_tokens must be",
     '[{"prompt_tokens": 7, "output_tokens": 1}]'),
    ("a.json", '[{"prompt_tokens": 7, "output_tokens": 1, "arrivals": 2}]', "unknown column 'arrivals'",
     '[{"prompt_tokens": 7, "output_tokens": 1, "arrival_s": 2}]'),
    ("a.json", '[{"prompt_tokens": 7,\n "output_tokens": }]', "line 2: not JSON",
     '[{"prompt_tokens": 7,\n "output_tokens": 1}]'),
    ("a.json", "[]", "holds no request", '[{"prompt_len": 7, "output_len": 1}]'),
    ("a.jsonl", "\n\n", "holds no request", mooncake((0, 7, 1))),
    ("a.csv.gz", AZURE + FIRST, "is not gzipped; name it without .gz", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "bad", "words", "good"), BAD_TRACES)
def test_bad_trace(write: Write, name: str, bad: str, words: str, good: str) -> None:
    path = write(name, bad)
    refused(lambda: read_trace(path), f"{path}: {words}")
    if good:
        assert len(read_trace(write(f"good-{name}", good)).requests) >= 1


def test_a_truncated_or_damaged_gzip_file_names_the_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = "".join(f"{k},{p},1\n" for k, p in enumerate(rng.integers(1, 10**6, 5000)))
    whole = gzip.compress((VIDUR + rows).encode())
    path = tmp_path / "trace.csv.gz"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"line 2\d\d\d: the gzip file ends early here; fetch it"):
        read_trace(path)
    path.write_bytes(whole[:-8] + b"\0" * 8)  # the sum at its end is wrong
    with pytest.raises(ValueError, match=r"line [45]\d\d\d: the gzip file is damaged here"):
        read_trace(path)
    path.write_bytes(whole[:5])
    refused(lambda: read_trace(path), f"{path}: line 1: the gzip file ends early here")
    path.write_bytes(whole)
    assert len(read_trace(path).requests) == 5000


def test_own_predictions_are_read_from_json(write: Write) -> None:
    row = {
        "prompt_tokens": 7,
        "output_tokens": 3,
        "predicted_output_tokens": 4,
        "predicted_spread": 0.5,
    }
    requests = read_requests(write("own.json", json.dumps([row])))
    assert requests.predicted_output_tokens.tolist() == [4]
    assert requests.predicted_spread is not None
    assert requests.predicted_spread.tolist() == [0.5]
    refused(
        lambda: read_requests(write("own.json", json.dumps([row | {"predicted_spread": 9}]))),
        "entry 1: predicted_spread must be a number in 0 … 5, got 9",
    )
