"""Stages of a LLaMA with few layers, timed: what a layer costs, for models that fit no single device.

The layers are transformers' own, with random weights: zeros would draw less power and run faster than a
model's. Keys and values lie in one block a layer, made beforehand, so that no step allocates or gathers any.
There is no mask: prompts are causal, and the requests of a decode round are equally long.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any, Final, Literal

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from servegym.envs.errors import ServegymError

Floats = tuple[float, ...]

_CACHE: Final = (
    "cache" if "cache" in signature(LlamaAttention.forward).parameters else "past_key_values"
)
"""What a layer calls its cache, which differs between versions."""

_GRAPH_STEPS: Final = 3
"""Steps on a stream of their own before one is recorded, as CUDA asks for."""


def check_device(device: str) -> None:
    """Refuse a device that is not here."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ServegymError(
            "--device cuda: torch sees no GPU here; take --device cpu and a small shape"
        )


@dataclass(frozen=True)
class Shape:
    """A LLaMA's sizes; heads all have keys and values of their own."""

    width: int
    heads: int
    inner: int
    """Width of the feed-forward part."""
    vocabulary: int


class _Slots:
    """Keys and values of all layers; a layer writes its new ones behind those cached, in place."""

    def __init__(self, layers: int, shape: Shape, tokens: int, like: dict[str, Any]) -> None:
        self._flat = [torch.randn(2, tokens * shape.width, **like) for _ in range(layers)]
        self._shape = shape
        self._views: list[Any] = []
        self._cached = 0

    def open(self, requests: int, cached: int, new: int) -> None:
        """Cut the blocks for so many requests, each with ``cached`` tokens and ``new`` to come."""
        heads, length = self._shape.heads, cached + new
        size = self._shape.width // heads
        used = requests * length * self._shape.width
        self._views = [flat[:, :used].view(2, requests, heads, length, size) for flat in self._flat]
        self._cached = cached

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Write new keys and values, return all; as a cache of transformers does."""
        block = self._views[layer]
        block[0, :, :, self._cached :] = keys
        block[1, :, :, self._cached :] = values
        return block[0], block[1]


class Layers:
    """A stack of layers with embedding and head, of which the first k may be run.

    Parameters
    ----------
    shape, layers
        Sizes, and the most layers that are run.
    tokens
        The most tokens, cached and new, of all requests of a stage.
    device, seed
        ``"cuda"`` (bfloat16, CUDA events) or ``"cpu"`` (float32, the process's CPU time), and of all draws.
    """

    def __init__(
        self, shape: Shape, layers: int, tokens: int, device: Literal["cuda", "cpu"], seed: int = 0
    ) -> None:
        check_device(device)
        torch.manual_seed(seed)
        config = LlamaConfig(
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            vocab_size=shape.vocabulary,
            max_position_embeddings=tokens + 1,
        )
        kind = torch.bfloat16 if device == "cuda" else torch.float32
        before = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        try:
            with torch.device(device):
                self._model = LlamaForCausalLM(config).eval()
        except torch.OutOfMemoryError as error:
            raise ServegymError(f"--device {device}: no room for {layers} such layers") from error
        finally:
            torch.set_default_dtype(before)
        self._model.set_attn_implementation("sdpa")
        self._device, self._vocabulary = device, shape.vocabulary
        self._slots = _Slots(layers, shape, tokens, {"dtype": kind, "device": device})

    @torch.inference_mode()
    def stage(self, requests: int, cached: int, new: int) -> Callable[[int], Any]:
        """Return what runs a stage by its first k layers.

        ``requests`` requests have ``cached`` tokens each and get ``new`` more: 1 of a decode round, the
        prompt of a prefill. Each gets the logits of its next token.
        """
        tokens = torch.randint(1, self._vocabulary, (requests, new), device=self._device)
        places = torch.arange(cached, cached + new, device=self._device)[None]
        self._slots.open(requests, cached, new)
        body, given = self._model.model, {_CACHE: self._slots}

        def run(depth: int) -> Any:
            hidden = body.embed_tokens(tokens)
            turned = body.rotary_emb(hidden, position_ids=places)
            for layer in body.layers[:depth]:
                hidden = layer(
                    hidden,
                    attention_mask=None,
                    position_ids=places,
                    position_embeddings=turned,
                    **given,
                )
            return self._model.lm_head(body.norm(hidden[:, -1:]))

        return run

    @torch.inference_mode()
    def seconds(
        self,
        run: Callable[[int], Any],
        depth: int,
        warm_ups: int,
        repeats: int,
        *,
        graph: bool = False,
    ) -> Floats:
        """Return the seconds of each of ``repeats`` stages, after some that warm up.

        With ``graph``, on a GPU alone, the stage is recorded once and replayed, so that Python's time to
        start its kernels is not in it.
        """

        def step() -> None:
            run(depth)

        if graph:
            step = self._recorded(step)
        for _ in range(warm_ups):
            step()
        if self._device == "cpu":
            found = []
            for _ in range(repeats):
                begun = time.process_time()
                step()
                found.append(time.process_time() - begun)
            return tuple(found)
        event: Any = torch.cuda.Event  # torch leaves it untyped
        events = [[event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for first, last in events:
            first.record()
            step()
            last.record()
        torch.cuda.synchronize()
        return tuple(1e-3 * float(first.elapsed_time(last)) for first, last in events)

    def _recorded(self, step: Callable[[], None]) -> Callable[[], None]:
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_GRAPH_STEPS):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded):
            step()
        replay: Callable[[], None] = recorded.replay
        return replay

    @torch.inference_mode()
    def attention(self, run: Callable[[int], Any]) -> str:
        """Return by which of torch's kernels a stage has attended, as the profiler names them."""
        with torch.profiler.profile() as profile:
            run(1)
        names = {event.key.removeprefix("aten::") for event in profile.key_averages()}
        found = sorted(name for name in names if name.startswith("_scaled_dot_product"))
        return ", ".join(found) or "no fused kernel"

    @property
    def described(self) -> str:
        """The device and torch in words."""
        name = torch.cuda.get_device_name() if self._device == "cuda" else "CPU, one thread's time"
        return f"{name}; torch {torch.__version__}"
