"""Policies of the simulator schedule a real inference engine, unchanged.

A ``Twin`` is one row of the simulator's state that is kept in step with an engine. The policy sees the twin
and is asked where the simulator would ask it; the engine runs what the twin says and tells who has
finished. Nothing else passes between them::

    loop:  submit(…) whoever has come, cancel(…) whoever has gone
           work()    what the engine runs next: a prefill of these requests, or one round of decoding
           ran(…)    who has finished with it, and how long it took

**Truth stays with the engine.** The twin expects lengths and never knows them; a length that is known is
a certain prediction (``spread`` 0). An end of text, a cap on tokens and a cancellation are one thing to
it: this request has finished. **Time is the caller's choice:** measured seconds, or the cost model's, with
which the twin does action for action, to the last bit, what ``play`` does. **Fast-forwarding is the
twin's:** the simulator jumps over decode rounds between which nothing can be decided and revises beliefs
where a jump ends. The twin keeps such a run open while the engine decodes it round by round, asks nobody
meanwhile, and books it as one stage.

``servegym.engines.huggingface`` lets a twin schedule transformers' continuous batching: ``Engine`` by hand,
``Service`` by the library's own thread, ``servegym.engines.front`` over HTTP. It needs the extra ``engine``.
``servegym.engines.vllm`` is a scheduler of vLLM. ``servegym.engines.calibration`` fits costs to an engine's
iterations. Commands: ``scripts/serve.py``, ``calibrate_engine.py``, ``check_engine.py``.

``Twin.forget`` makes room: an engine may serve more requests than a twin holds. Left out: several replicas
and moves between them, a limit of KV memory, mixed stages, sheds, limits of classes. A task that has one of
these is refused.

Examples
--------
>>> from servegym.baselines import make_policy
>>> from servegym.engines import Twin
>>> from servegym.envs import TASKS
>>> twin = Twin(TASKS["servegym/Tiny-v0"], make_policy("fcfs"))
>>> twin.submit(prompt_tokens=70, expected_output_tokens=3, now_s=0.0)
0
>>> twin.work()
Work(kind='prefill', ids=(0,))
>>> twin.ran()
>>> twin.work()
Work(kind='decode', ids=(0,))
>>> twin.ran(finished=[0])  # its text has ended, earlier than expected
>>> twin.work() is None, twin.records().decode_rounds
(True, array([1], dtype=int32))
"""

from lazy_loader import attach_stub

# The names that __init__.pyi lists, each imported when it is first asked for.
__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
