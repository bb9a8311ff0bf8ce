"""Links over which keys and values of requests are copied: latency and bytes per second."""

from __future__ import annotations

from typing import Final, NamedTuple


class Link(NamedTuple):
    """A link, per direction, and where its numbers are from."""

    latency_s: float
    bytes_per_s: float
    source: str


LINKS: Final[dict[str, Link]] = {
    "nvlink": Link(4e-4, 200e9, "NVLink within a node, rounded down from NVLink 3's 300 GB/s"),
    "rdma8": Link(
        4e-4, 137e9, "8 × 200 Gb/s RoCE: fit of Mooncake's H800 measurements, 128 … 32,768 tokens"
    ),
    "rdma1": Link(1e-3, 40e9, "one 400 Gb/s network card, nearly at its rate"),
    "tcp": Link(5e-3, 3e9, "TCP over a loaded network, as users of agentic clusters report"),
    "ethernet10": Link(5e-3, 1.1e9, "10 Gb/s Ethernet at its rate"),
    "pcie4": Link(1e-4, 25e9, "PCIe 4 × 16, as used between GPU and host"),
    "pcie5": Link(1e-4, 50e9, "PCIe 5 × 16, as used between GPU and host"),
}
"""Links by name; a task may also write its own numbers."""
