"""Columns of published traces: what a file of each holds, and where its figures are from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple

from servegym.envs.errors import ServegymError, nearest

OWN: Final = "servegym"
"""Our own columns, whose files are read strictly: nothing is dropped from them."""


class Format(NamedTuple):
    """Names of the columns of a trace; further columns are passed over."""

    prompt: str
    output: str
    arrival: str
    per_s: float | None  # units of the arrival column in a second; None: dates
    needs_arrival: bool
    source: str

    @property
    def lengths(self) -> set[str]:
        """The two columns by which it is recognised."""
        return {self.prompt, self.output}

    @property
    def columns(self) -> str:
        """Its columns, for messages and listings."""
        arrival = self.arrival if self.needs_arrival else f"[{self.arrival}]"
        return f"{self.prompt}, {self.output}, {arrival}"


FORMATS: Final = {
    OWN: Format(
        "prompt_tokens", "output_tokens", "arrival_s", 1.0, False, "our own; arrival_s in seconds"
    ),
    "azure": Format(
        "ContextTokens",
        "GeneratedTokens",
        "TIMESTAMP",
        None,
        True,
        "Azure LLM inference traces of 2023 and 2024 (Azure/AzurePublicDataset, CC-BY-4.0); dates",
    ),
    "burstgpt": Format(
        "Request tokens",
        "Response tokens",
        "Timestamp",
        1.0,
        True,
        "BurstGPT, with and without Session ID (HPMLL/BurstGPT, CC-BY-4.0); seconds",
    ),
    "mooncake": Format(
        "input_length",
        "output_length",
        "timestamp",
        1e3,
        False,
        "Mooncake (kvcache-ai/Mooncake, Apache-2.0), ServeGen's offline traces; milliseconds",
    ),
    "vidur": Format(
        "num_prefill_tokens",
        "num_decode_tokens",
        "arrived_at",
        1.0,
        False,
        "Vidur's processed traces (microsoft/vidur, MIT); seconds",
    ),
    "llmservingsim": Format(
        "input_toks",
        "output_toks",
        "arrival_time_ns",
        1e9,
        False,
        "LLMServingSim's ShareGPT lengths (casys-kaist/LLMServingSim, MIT); nanoseconds",
    ),
    "lengths": Format(
        "prompt_len",
        "output_len",
        "arrival_time",
        1.0,
        False,
        "lengths as serving benchmarks write them for ShareGPT; seconds",
    ),
}
"""Formats by name, recognised by the columns of both token counts."""

_TEXTS: Final = ("conversations", "messages", "prompt", "conversation")


def recognise(names: Collection[str]) -> str | None:
    """Return the format whose token columns are among ``names``; None where there is none.

    Raises
    ------
    ServegymError
        Without the place, if they are those of two formats, or only in part those of one.
    """
    found = [name for name, form in FORMATS.items() if form.lengths <= set(names)]
    if len(found) > 1:
        raise ServegymError(f"columns of both {found[0]} and {found[1]}; keep those of one")
    if found:
        form = FORMATS[found[0]]
        if form.needs_arrival and form.arrival not in names:
            raise ServegymError(_missing(found[0], form.arrival, names))
        return found[0]
    for name, form in FORMATS.items():
        for column in sorted(form.lengths & set(names)):
            if name != OWN:
                (other,) = form.lengths - {column}
                raise ServegymError(_missing(name, other, names))
    if set(_TEXTS) & set(names):
        raise ServegymError(
            "holds texts, not token counts; count the tokens of each request and write "
            "prompt_tokens and output_tokens"
        )
    return None


def _missing(form: str, column: str, names: Collection[str]) -> str:
    hint = nearest(column, names) if len(names) else ""
    hint = hint if "did you mean" in hint else ""
    text = f"column {column!r} is missing; {form} has {FORMATS[form].columns}"
    return text + hint.replace("did you mean", "is it")
