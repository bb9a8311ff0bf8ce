"""A front in OpenAI's form over a service: ``/v1/completions``, whole or streamed, and ``/v1/models``.

For load generators and clients on the same machine; it knows no keys and no users. Tokens are always the
likeliest: ``temperature`` and its like are taken and change nothing. What would change the answer otherwise,
such as ``stop`` or ``echo``, is refused. A client that goes away cancels its request. When the engine fails
whoever waits is told so at once, and ``on_fault`` is called, which should end the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

from servegym.engines.huggingface import FullError, Service
from servegym.envs.errors import ServegymError, not_installed, shown

try:
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route
except ImportError:
    raise not_installed("starlette", "engine") from None

LOOKS_S: Final = 0.005
"""How often a waiting answer looks for new tokens."""

COLLECTS_S: Final = 0.1
"""How often what has been answered is collected, and a fault of the engine noticed where nobody waits."""

SPREAD: Final = 0.7
"""Nobody predicts lengths: half the most, give or take a factor of two."""


ABSENT: Final[dict[str, tuple[Any, ...]]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False, 0),
    "stop": (None, "", []),
    "suffix": (None, ""),
}
"""Parameters that are not had, and the values that ask for nothing."""

_CUT: Final = "\ufffd"
"""What a tokenizer gives for a letter of which tokens are still to come."""


class Letters:
    """A stand-in for a tokenizer where a model has none: a token a byte, answers as numbers."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def encode(self, text: str) -> list[int]:
        """Return a token id for each byte."""
        whole = text.encode(errors="replace")
        return [1 + byte % (self._vocabulary - 1) for byte in whole]

    def decode(self, tokens: list[int], *, skip_special_tokens: bool = False) -> str:
        """Return token ids as a text."""
        return "".join(f" {token}" for token in tokens)


class Front:
    """Answers requests by a running service.

    Parameters
    ----------
    service, model
        What serves, and the name that clients see.
    tokenizer, ends
        ``encode`` and ``decode``, and the token ids that end a text.
    most_tokens, room_tokens
        The most output tokens of a request, and the most with its prompt.
    on_fault
        Called once, when the engine has failed; ``fault`` says then why.
    """

    def __init__(
        self,
        service: Service,
        model: str,
        tokenizer: Any,
        ends: tuple[int, ...],
        most_tokens: int,
        room_tokens: int,
        on_fault: Callable[[], None] = lambda: None,
    ) -> None:
        self.fault = ""
        """Why the engine has failed, in one line; empty: it has not."""
        self._on_fault = on_fault
        self._service, self._model, self._tokenizer = service, model, tokenizer
        self._ends, self._most, self._room = ends, most_tokens, room_tokens
        self._started = int(time.time())

    def app(self) -> Starlette:
        """Return the application, for any ASGI server."""
        return Starlette(
            routes=[
                Route("/v1/completions", self.completions, methods=["POST"]),
                Route("/v1/models", self.models),
            ],
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        watch = asyncio.create_task(self._watch())
        yield
        watch.cancel()

    async def _watch(self) -> None:
        """Collect what has been answered, until the engine fails."""
        while not self.fault:
            try:
                self._service.collect()
            except Exception as error:  # whatever twin, policy and engine may raise
                self._note(error)
            await asyncio.sleep(COLLECTS_S)

    def _note(self, error: Exception) -> None:
        """Note a fault of the engine."""
        if not self.fault:
            words = " ".join(str(error).split())
            known = isinstance(error, ServegymError)
            self.fault = (
                words if known else f"the engine has failed: {type(error).__name__}: {words}"
            )
            self._on_fault()

    def _progress(self, name: str) -> tuple[list[int], bool]:
        """Return the output tokens of a request so far, and whether it has ended; refuse after a fault."""
        try:
            return self._service.progress(name)
        except Exception as error:
            fault = self._service.fault
            if fault is None:
                raise
            self._note(fault)
            raise ServegymError(self.fault) from error

    async def models(self, _: Request) -> Response:
        """List the one model."""
        entry = {"id": self._model, "object": "model", "created": self._started}
        return JSONResponse({"object": "list", "data": [entry | {"owned_by": "servegym"}]})

    async def completions(self, request: Request) -> Response:
        """Answer a prompt."""
        if self.fault:
            return _refused(self.fault, 500)
        try:
            body = await request.json()
            name, prompt, most = self._submitted(body)
        except ClientDisconnect:
            return Response(status_code=499)
        except FullError as error:
            return _refused(str(error), 503)
        except ServegymError as error:
            return _refused(str(error))
        except (ValueError, RecursionError):
            return _refused("the body must be JSON")
        if body.get("stream"):
            options = body.get("stream_options") or {}
            usage = bool(isinstance(options, dict) and options.get("include_usage"))
            stream = self._streamed(name, prompt, most, usage=usage)
            return StreamingResponse(stream, media_type="text/event-stream")
        try:
            while not (seen := self._progress(name))[1]:
                if await request.is_disconnected():
                    self._service.cancel(name)
                    return Response(status_code=499)
                await asyncio.sleep(LOOKS_S)
        except ServegymError as error:
            return _refused(str(error), 500)
        tokens, _ = seen
        answer = self._answer(name, self._text(tokens), self._why(tokens, most))
        return JSONResponse(answer | {"usage": _usage(prompt, len(tokens))})

    def _submitted(self, body: Any) -> tuple[str, int, int]:
        """Hand a request over; return its name, its prompt's tokens and the most that it may get."""
        if not isinstance(body, dict):
            raise ServegymError(f"the body must be a JSON object, got {shown(body)}")
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
            prompt = prompt[0]
        if isinstance(prompt, str):
            # Half a letter, which JSON can hold and no tokenizer takes, becomes a question mark.
            prompt = self._tokenizer.encode(prompt.encode(errors="replace").decode())
        whole = isinstance(prompt, list) and all(type(token) is int for token in prompt)
        if not isinstance(prompt, list) or not whole:
            raise ServegymError("prompt must be one text or one list of token ids")
        most = body.get("max_tokens")
        most = 16 if most is None else most  # OpenAI's
        if type(most) is not int or not 1 <= most <= self._most:
            raise ServegymError(f"max_tokens must lie in 1 … {self._most}, got {shown(most)}")
        for parameter, nothing in ABSENT.items():
            if body.get(parameter) not in nothing:
                raise ServegymError(
                    f"{parameter} must be {shown(nothing[-1])}, got {shown(body[parameter])}"
                )
        if len(prompt) + most > self._room:
            raise ServegymError(
                f"a prompt of {len(prompt)} tokens and {most} more exceed {self._room} tokens"
            )
        ends = () if body.get("ignore_eos") else self._ends
        expected = most if not ends else max(1, most // 2)
        name = self._service.submit(prompt, most, expected, SPREAD if ends else 0.0, ends=ends)
        return name, len(prompt), most

    async def _streamed(
        self, name: str, prompt: int, most: int, *, usage: bool
    ) -> AsyncIterator[str]:
        """Yield an event for new tokens, a last one, and the end."""
        sent, said, ended = 0, "", False
        try:
            while not ended:
                tokens, ended = self._progress(name)
                if len(tokens) > sent or ended:
                    sent, text = len(tokens), self._text(tokens)
                    if not ended:  # a letter may still change with the tokens to come
                        text = text.rstrip(_CUT)
                    new = text[len(said) :] if text.startswith(said) else ""
                    said = said + new
                    reason = self._why(tokens, most) if ended else None
                    yield _event(self._answer(name, new, reason))
                if not ended:
                    await asyncio.sleep(LOOKS_S)
            if usage:
                last = self._answer(name, "", None) | {"choices": [], "usage": _usage(prompt, sent)}
                yield _event(last)
            yield "data: [DONE]\n\n"
        except ServegymError as error:
            yield _event({"error": {"message": str(error), "type": "server_error"}})
        finally:
            if not ended:  # the client has gone
                self._service.cancel(name)

    def _text(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _why(self, tokens: list[int], most: int) -> str:
        return "length" if len(tokens) >= most and tokens[-1] not in self._ends else "stop"

    def _answer(self, name: str, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}
        return {
            "id": f"cmpl-{name}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._model,
            "choices": [choice],
        }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _usage(prompt: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}


def _refused(message: str, status: int = 400) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind}}, status_code=status)
