"""What ``--cluster ADDRESS`` may say, and the connection to what it names."""

from __future__ import annotations

import importlib.util
import os
import socket
import threading
from pathlib import Path
from typing import Final, NamedTuple

from servegym.envs.errors import ServegymError, shown
from servegym.envs.playing.nodes.driver import Backend, Nodes

FORMS: Final = (
    "tcp://HOST:PORT of a dask scheduler, ray://HOST:PORT of a Ray client server, or ray:auto or "
    "ray:HOST:PORT of a Ray cluster that this machine is part of"
)

ANSWER_S: Final = 5.0
"""How long a port may take to answer."""

LIMITS_S: Final = {"dask": 9.0, "ray": 60.0}
"""How long it may take to join a cluster; Ray's client server starts a process for each driver."""

_TOKEN_ADVICE: Final = (
    "where it asks for a token, copy the head's ~/.ray/auth_token to this machine"
)

_EXTRAS: Final = {"dask": ("distributed", "cluster"), "ray": ("ray", "ray")}


class Address(NamedTuple):
    """An address that is of a known form."""

    kind: str
    """``dask`` or ``ray``."""
    target: str
    """What the library takes."""
    host: str = ""
    port: int = 0


def parse_address(text: str) -> Address:
    """Return what an address means.

    Raises
    ------
    ServegymError
        If it is of no known form.

    Examples
    --------
    >>> parse_address("tcp://10.0.0.1:8786")
    Address(kind='dask', target='tcp://10.0.0.1:8786', host='10.0.0.1', port=8786)
    >>> parse_address("ray:auto").target, parse_address("ray:10.0.0.1:6379").target
    ('auto', '10.0.0.1:6379')
    """
    for start, kind in {"tcp://": "dask", "tls://": "dask", "ray://": "ray"}.items():
        if text.startswith(start):
            return Address(kind, text, *_host_and_port(text, text.removeprefix(start)))
    if text == "ray:auto":
        return Address("ray", "auto")
    if text.startswith("ray:"):
        target = text.removeprefix("ray:")
        return Address("ray", target, *_host_and_port(text, target))
    advice = f"; did you mean tcp://{text} or ray:{text}?" if _is_place(text) else ""
    raise ServegymError(f"--cluster {shown(text)} is no address{advice or f'; write {FORMS}'}")


def connect(text: str, warm_up: str = "") -> Nodes:
    """Return the workers at an address.

    Parameters
    ----------
    text
        See ``FORMS``.
    warm_up
        Module that compiles every kernel, run once a node.

    Raises
    ------
    ServegymError
        Within 10 s, if the address is of no known form, the library for it is not installed, nobody
        answers, or there is no worker; or if a worker is of another version.
    """
    address = parse_address(text)
    module, extra = _EXTRAS[address.kind]
    if importlib.util.find_spec(module) is None:
        raise ServegymError(
            f"--cluster {text}: {module} is not installed; get it by `pip install 'servegym[{extra}]'`"
        )
    if address.host:
        _check_answer(text, address)
    return Nodes(_in_time(text, address), warm_up)


def _in_time(text: str, address: Address) -> Backend:
    """Connect; refuse what takes a connection and then says nothing, as a server of another kind does.

    In a thread, which is left behind then, and so that the libraries leave the handlers of signals alone.
    """
    came: list[Backend | BaseException] = []

    def begin() -> None:
        try:
            came.append(_backend(text, address))
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=begin, daemon=True)
    thread.start()
    thread.join(LIMITS_S[address.kind])
    if not came:
        name = {"dask": "a dask scheduler", "ray": "a Ray cluster"}[address.kind]
        advice = f"; {_TOKEN_ADVICE}" if _is_client(address) else ""
        raise ServegymError(
            f"--cluster {text}: what listens there does not answer as {name}{advice}"
        )
    if isinstance(came[0], BaseException):
        raise came[0]
    return came[0]


def _backend(text: str, address: Address) -> Backend:
    if address.kind == "dask":
        from servegym.envs.playing.nodes.dask_backend import DaskBackend

        return DaskBackend(address.target)
    if _is_client(address):
        _show_token()
    from servegym.envs.playing.nodes.ray_backend import RayBackend

    return RayBackend(text, address.target)


def _is_client(address: Address) -> bool:
    return address.target.startswith("ray://")


def _show_token() -> None:
    """Have Ray's client show this machine's token, if there is one, as Ray does for clusters it is part of.

    Without, a cluster that asks for tokens does not answer. Ray reads the variable when it is imported.
    """
    kept = Path.home() / ".ray" / "auth_token"
    if kept.is_file() or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _is_place(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and "/" not in text and port.isascii() and port.isdigit()


def _host_and_port(text: str, place: str) -> tuple[str, int]:
    host, _, port = place.rpartition(":")
    if not _is_place(place) or not 1 <= int(port[:6]) <= 65535:
        raise ServegymError(
            f"--cluster {shown(text)} must end in HOST:PORT with a port in 1 … 65535; write {FORMS}"
        )
    return host.strip("[]"), int(port)


def _check_answer(text: str, address: Address) -> None:
    """Refuse a port that nobody listens at: both libraries try for a minute and say much."""
    try:
        socket.create_connection((address.host, address.port), timeout=ANSWER_S).close()
    except OSError as error:
        reason = error.strerror or str(error) or "no answer"
        raise ServegymError(f"--cluster {text}: nobody answers there: {reason}") from None
