"""Requests of the slow reference, what has happened to each, and the greedy plan of them."""

from __future__ import annotations

from dataclasses import dataclass

from servegym.envs.workload.requests import Requests


@dataclass(eq=False)
class Request:
    """One request and what has happened to it."""

    id: int
    arrival_s: float
    prompt: int
    output: int
    believed: int | None = None  # output tokens the scheduler expects by now; None: it knows them
    compared: int | None = None  # output tokens that it is compared by; None: the true ones
    phase: str = "future"  # future, waiting, running, finished
    emitted: int = 0  # output tokens so far
    client: int | None = None
    admitted_s: float | None = None  # start of its prefill stage
    first_token_s: float | None = None  # end of its prefill stage
    finished_s: float | None = None

    @property
    def rounds(self) -> int:
        """True decode rounds in all: the prefill stage emits the first token."""
        return self.output - 1

    @property
    def rounds_left(self) -> int:
        """True decode rounds left to a running request, hidden from the scheduler."""
        return self.output - self.emitted

    @property
    def expected_rounds(self) -> int:
        """Decode rounds in all that the scheduler expects."""
        return (self.output if self.believed is None else self.believed) - 1

    @property
    def expected_left(self) -> int:
        """Decode rounds left to a running request that the scheduler expects."""
        return self.expected_rounds + 1 - self.emitted

    @property
    def compared_rounds(self) -> int:
        """Decode rounds by which waiting requests are compared."""
        return (self.output if self.compared is None else self.compared) - 1


def make_requests_list(requests: Requests) -> list[Request]:
    """Requests of an instance as objects, in id order."""
    rows = zip(requests.arrival_s, requests.prompt_tokens, requests.output_tokens, strict=True)
    return [Request(i, float(a), int(p), int(o)) for i, (a, p, o) in enumerate(rows)]


def greedy_queues(requests: list[Request], clients: int) -> list[list[Request]]:
    """Those present at t = 0, longest first, each to the least loaded client.

    A request without rounds adds no load; it goes to the client with the fewest requests.
    """
    queues: list[list[Request]] = [[] for _ in range(clients)]
    present = [request for request in requests if request.arrival_s == 0]
    present.sort(key=lambda request: (-request.compared_rounds, request.id))
    for request in sorted(present, key=lambda request: request.expected_rounds == 0):
        loads = [sum(other.expected_rounds for other in queue) for queue in queues]
        if request.expected_rounds == 0:
            held = [len(queue) for queue in queues]
            queues[min(range(clients), key=lambda c: (held[c], loads[c]))].append(request)
        else:
            queues[loads.index(min(loads))].append(request)
    for queue in queues:
        queue.sort(key=present.index)
    return queues
