"""Requests of one episode."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from servegym.envs.arguments import as_annotated, plain, real_numbers, whole_numbers
from servegym.envs.errors import ServegymError, shown

MAX_TOKENS: Final = 10_000_000
"""Longest prompt or output accepted, in tokens; beyond it a file is taken to be wrong."""

MAX_REQUESTS: Final = 10_000_000
"""Most requests of an episode."""

MAX_ARRIVAL_S: Final = 1e9
"""Latest arrival accepted, in seconds."""

MAX_ROW: Final = 2**40
"""Last row of a file that a request may be from."""

MAX_CLASSES: Final = 100
"""Most classes of requests; each gets rows of its own in tables."""

EVERYBODY: Final = "*"
"""Stands for all classes in a table, so no class may be called that."""

MAX_SPREAD: Final = 5.0
"""Largest standard deviation of a log length accepted; a factor of 150 either way."""

NOT_PREDICTED: Final = (
    "these requests have no predicted output lengths; sample_requests and inform predict them as the "
    "task says"
)


@dataclass(frozen=True, eq=False)
class Requests:
    """The requests of one episode, in arrival order: a request's id is its row.

    A prediction is a lognormal distribution of the output length: its mean and the standard
    deviation of the length's logarithm, 0 where the predictor is certain. Without a spread
    there are no predictions: the predicted lengths repeat the true ones.

    Raises
    ------
    ServegymError
        If the arrays hold anything but numbers in one dimension, differ in length, are empty or longer
        than ``MAX_REQUESTS``, hold a token count outside 1 … ``MAX_TOKENS``, a spread outside 0 …
        ``MAX_SPREAD`` or an arrival outside 0 … ``MAX_ARRIVAL_S`` or earlier than the one before it, if
        ``rows`` holds a row twice, or none of a file, or if a class has no name, or no name of its own.

    Examples
    --------
    >>> requests = make_requests([70, 55], [300, 120])
    >>> len(requests), requests.decode_rounds
    (2, array([299, 119]))
    """

    arrival_s: NDArray[np.float64]  # (requests,) seconds, nondecreasing
    prompt_tokens: NDArray[np.int64]  # (requests,) ≥ 1
    output_tokens: NDArray[np.int64]  # (requests,) ≥ 1, the prefill stage emits the first
    predicted_output_tokens: NDArray[np.int64]  # (requests,) ≥ 1, mean that a predictor expects
    predicted_spread: NDArray[np.float64] | None = None  # (requests,) or None: not predicted
    rows: NDArray[np.int64] | None = (
        None  # (requests,) the row of its file where each stood; None: in this order
    )
    class_of: NDArray[np.int64] | None = field(default=None, kw_only=True)
    # (requests,) place in class_names; None: no classes
    class_names: tuple[str, ...] = field(
        default=(), kw_only=True
    )  # also of those without a request

    def __post_init__(self) -> None:
        self._set("arrival_s", real_numbers("arrival_s", self.arrival_s))
        if len(self.arrival_s) == 0:
            raise ServegymError("a workload needs at least one request, got none")
        if len(self.arrival_s) > MAX_REQUESTS:
            raise ServegymError(
                f"a workload has at most {MAX_REQUESTS} requests, got {len(self.arrival_s)}"
            )
        predicted = self.predicted_output_tokens
        for name in ("prompt_tokens", "output_tokens"):
            self._set(name, _tokens(name, getattr(self, name)))
        if predicted is not self.output_tokens:  # the usual case is not looked at twice
            predicted = _tokens("predicted_output_tokens", predicted)
        self._set("predicted_output_tokens", predicted)
        if self.predicted_spread is not None:
            self._set_spread(self.predicted_spread)
        if self.rows is not None:
            rows = whole_numbers("rows", self.rows, 0, MAX_ROW)
            self._set("rows", rows)
            in_order = np.sort(rows)  # faster than np.unique
            if (in_order[1:] == in_order[:-1]).any():
                raise ServegymError("rows must hold each row once")
        self._check_classes()
        arrivals = self.arrival_s
        ordered = bool((arrivals[1:] >= arrivals[:-1]).all())  # False where one is NaN
        if not (ordered and arrivals[0] >= 0 and arrivals[-1] <= MAX_ARRIVAL_S):
            _refuse_arrivals(arrivals)

    def _set_spread(self, values: ArrayLike) -> None:
        spread = real_numbers("predicted_spread", values)
        self._set("predicted_spread", spread)
        if not np.all((spread >= 0) & (spread <= MAX_SPREAD)):
            raise ServegymError(f"predicted_spread must lie in 0 … {MAX_SPREAD:g}")

    def _check_classes(self) -> None:
        if self.class_of is None and self.class_names == ():
            return  # the usual case
        names = tuple(as_annotated("class_names", self.class_names, tuple[str, ...]))
        object.__setattr__(self, "class_names", names)
        if len(set(names)) < len(names) or len(names) > MAX_CLASSES:
            raise ServegymError(f"class_names must name each class once, at most {MAX_CLASSES}")
        if not all(names) or EVERYBODY in names:
            raise ServegymError(f"class_names must be texts other than {EVERYBODY!r}, none empty")
        if (self.class_of is None) != (len(names) == 0):
            raise ServegymError("class_of and class_names must both be given or both be left out")
        if self.class_of is not None:
            self._set("class_of", whole_numbers("class_of", self.class_of, 0, len(names) - 1))

    def _set(self, name: str, values: NDArray[Any]) -> None:
        """Put a checked column in the place of what was passed in."""
        if name != "arrival_s" and len(values) != len(self.arrival_s):
            raise ServegymError(
                f"{name} has {len(values)} entries, arrival_s has {len(self.arrival_s)}"
            )
        object.__setattr__(self, name, values)  # the way into a frozen dataclass

    def __len__(self) -> int:
        return len(self.arrival_s)

    def first(self, count: int) -> Requests | None:
        """Return the ``count`` earliest requests, without ``rows``; None if there are none."""
        if count == 0:
            return None
        spread = self.predicted_spread
        return Requests(
            self.arrival_s[:count],
            self.prompt_tokens[:count],
            self.output_tokens[:count],
            self.predicted_output_tokens[:count],
            None if spread is None else spread[:count],
            class_of=None if self.class_of is None else self.class_of[:count],
            class_names=self.class_names,
        )

    @property
    def decode_rounds(self) -> NDArray[np.int64]:
        """Decode rounds each request needs after its prefill: output tokens − 1, shape (requests,)."""
        return self.output_tokens - 1

    def with_predictions(self, tokens: ArrayLike, spread: ArrayLike) -> Requests:
        """Return the requests with other predictions; their own columns are not checked once more.

        Raises
        ------
        ServegymError
            As the class does, of these columns.
        """
        predicted = copy(self)
        predicted._set("predicted_output_tokens", _tokens("predicted_output_tokens", tokens))
        predicted._set_spread(spread)
        return predicted

    def as_predicted(self) -> Requests:
        """Return the requests with their predictions in the place of the true lengths.

        Raises
        ------
        ServegymError
            If the requests carry no predictions.
        """
        if self.predicted_spread is None:
            raise ServegymError(NOT_PREDICTED)
        return replace(self, output_tokens=self.predicted_output_tokens)


def _refuse_arrivals(arrivals: NDArray[np.float64]) -> NoReturn:
    """Say what is wrong with arrival times that are not 0 … ``MAX_ARRIVAL_S`` in ascending order."""
    on_time = (arrivals >= 0) & (arrivals <= MAX_ARRIVAL_S)
    if on_time.all():
        raise ServegymError("arrival_s must not decrease; sort the requests first")
    i = int(np.argmin(on_time))
    raise ServegymError(
        f"arrival_s must be finite and ≥ 0, at most {MAX_ARRIVAL_S:g} seconds, got {arrivals[i]} for "
        f"request {i}"
    )


def make_requests(
    prompt_tokens: ArrayLike,
    output_tokens: ArrayLike,
    arrival_s: ArrayLike | None = None,
    predicted_output_tokens: ArrayLike | None = None,
    predicted_spread: ArrayLike | None = None,
    *,
    classes: Sequence[int | str] | None = None,
) -> Requests:
    """Sort by arrival (ties keep their order) and fill the optional columns.

    Missing arrivals are 0; missing predictions are the true output lengths. Predictions without a
    spread get one and the same: the root mean square of log(true / predicted), what a predictor's
    user knows of its errors in general. ``classes`` names the class of each request, if it has any.

    Raises
    ------
    ServegymError
        If a column is not a list or an array of one dimension, holds no numbers or numbers out of the
        range that :class:`Requests` names, the columns differ in length, or there are more than
        ``MAX_CLASSES`` classes.

    Examples
    --------
    >>> make_requests([70, 55], [300, 120], arrival_s=[0.0, 1.5]).arrival_s
    array([0. , 1.5])
    """
    # Copies, so that the caller may go on writing into the arrays.
    prompts = _tokens("prompt_tokens", prompt_tokens).copy()
    outputs = _tokens("output_tokens", output_tokens).copy()
    arrivals = np.zeros(len(prompts)) if arrival_s is None else real_numbers("arrival_s", arrival_s)
    predictions = outputs
    if predicted_output_tokens is not None:
        predictions = _tokens("predicted_output_tokens", predicted_output_tokens).copy()
    spread = None
    if predicted_spread is not None:
        if predicted_output_tokens is None:
            raise ServegymError("predicted_spread needs predicted_output_tokens beside it")
        spread = real_numbers("predicted_spread", predicted_spread).copy()
    lengths = [len(prompts), len(outputs), len(arrivals), len(predictions)]
    if len({*lengths, lengths[0] if spread is None else len(spread)}) > 1:
        raise ServegymError(
            f"a workload's columns must be equally long, got {len(prompts)} prompt_tokens, "
            f"{len(outputs)} output_tokens, {len(arrivals)} arrival_s, {len(predictions)} predictions"
            + ("" if spread is None else f", {len(spread)} spreads")
        )
    if predicted_output_tokens is not None and spread is None:
        spread = np.full(len(outputs), _usual_error(outputs, predictions))
    class_of, class_names = _coded(classes, len(prompts))
    if arrival_s is None:
        return Requests(
            arrivals,
            prompts,
            outputs,
            predictions,
            spread,
            class_of=class_of,
            class_names=class_names,
        )
    order = np.argsort(arrivals, kind="stable")
    moved = bool((order[1:] < order[:-1]).any())
    return Requests(
        arrivals[order],
        prompts[order],
        outputs[order],
        predictions[order],
        None if spread is None else spread[order],
        order if moved else None,
        class_of=None if class_of is None else class_of[order],
        class_names=class_names,
    )


def _coded(
    classes: Sequence[int | str] | None, requests: int
) -> tuple[NDArray[np.int64] | None, tuple[str, ...]]:
    """Return the class of each request as a place in the names of all classes, and these in order.

    Whole numbers are in the order of numbers, texts in that of the alphabet.
    """
    if classes is None:
        return None, ()
    labels = [_label(k, label) for k, label in enumerate(classes)]
    if len(labels) != requests:
        raise ServegymError(
            f"classes must name the class of each of {requests} requests, got {len(labels)}"
        )
    names = sorted(set(labels))
    if len(names) > MAX_CLASSES:
        raise ServegymError(f"a workload has at most {MAX_CLASSES} classes, got {len(names)}")
    if all(name.isascii() and name.isdigit() for name in names):
        names.sort(key=int)
    place = {name: k for k, name in enumerate(names)}
    return np.array([place[label] for label in labels], np.int64), tuple(names)


def _label(entry: int, value: object) -> str:
    """Return the name of a class: a text, or a whole number as a text."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).strip():
        raise ServegymError(
            f"classes must be texts or whole numbers, got {shown(value)} (entry {entry})"
        )
    return str(value).strip()


def _usual_error(outputs: NDArray[np.int64], predictions: NDArray[np.int64]) -> float:
    """Return the root mean square of log(true / predicted), at most ``MAX_SPREAD``."""
    if len(outputs) == 0:
        return 0.0  # ``Requests`` says what is wrong
    errors = np.log(outputs / predictions)
    return min(float(np.sqrt(np.mean(errors**2))), MAX_SPREAD)


def _tokens(name: str, values: ArrayLike) -> NDArray[np.int64]:
    return whole_numbers(name, values, 1, MAX_TOKENS)
