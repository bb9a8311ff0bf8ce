"""Hugging Face transformers' continuous batching, scheduled by a twin.

The only package that imports transformers and, here, torch. ``Engine`` is advanced by hand, an iteration at
a time, for measurements; ``Service`` runs the library's own thread. Both refuse in one line whatever
would part the twin from the engine: another scheduler than ours (the library takes its own when it does
not know a name), a prompt in pieces, a request that memory does not hold, prefixes that requests share,
batches in flight.
"""

from servegym.engines.huggingface.installed import check_installed

check_installed()

from servegym.engines.huggingface.driving import Engine  # noqa: E402
from servegym.engines.huggingface.models import (  # noqa: E402
    SMOLLM2,
    generate,
    load_model,
    tiny_llama,
    use_threads,
)
from servegym.engines.huggingface.scheduler import TwinScheduler  # noqa: E402
from servegym.engines.huggingface.service import FullError, Service  # noqa: E402

__all__ = [
    "SMOLLM2",
    "Engine",
    "FullError",
    "Service",
    "TwinScheduler",
    "check_installed",
    "generate",
    "load_model",
    "tiny_llama",
    "use_threads",
]
