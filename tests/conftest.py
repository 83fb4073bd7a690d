"""Several gloo processes on one CPU: started once a session, each test case gets a fresh process group in them."""

import contextlib
import gc
import json
import os
import random
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from warm import IMPORTED

from runtime import ranks as runtime_ranks

MOST_RANKS = 4
MOST_GROUPS = 32  # gloo never ends the network threads of a process group that is gone, and some of them spin


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=8, help="how often test_kill.py kills a run (default: 8)")
    parser.addoption(
        "--override", action="append", default=[], metavar="SECTION.KEY=VALUE", help="run every law with this key set"
    )


# ---------------------------------------------------------------------------------------------------------------------
# --override: the laws hold with a fork's keys too


class Overrides:
    """The keys of `--override`. A law gives them to its runs; one that no law has read is an error."""

    def __init__(self, arguments: list[str]):
        self.values: dict[str, Any] = {}
        for argument in arguments:
            import configs  # not in every process of `ranks`

            name, _, text = argument.partition("=")
            self.values[name] = configs.check_value(name, configs.parse_argument(text, configs.HINTS.get(name, str)))
        self.unread = set(self.values)

    def beside(self, own: Iterable[str] = (), only: str = "") -> dict[str, Any]:
        """Those that a law does not set itself, if `only` starts their names."""
        found = {key: value for key, value in self.values.items() if key not in own and key.startswith(only)}
        self.unread -= set(found)
        return found


OVERRIDES = pytest.StashKey[Overrides]()


def pytest_configure(config: pytest.Config) -> None:
    try:
        config.stash[OVERRIDES] = Overrides(config.option.override)
    except ValueError as error:
        raise pytest.UsageError(f"--override {error}") from error


@pytest.fixture(scope="session")
def overrides(request: pytest.FixtureRequest) -> Overrides:
    return request.config.stash[OVERRIDES]


def pytest_collection() -> None:
    gc.disable()  # what all files import is no garbage


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.stash[OVERRIDES].unread and not session.config.option.collectonly:
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for name in sorted(config.stash[OVERRIDES].unread):
        terminalreporter.write_line(f"ERROR: --override {name} was read by no law", red=True)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def serve(rank: int, pipe: Any) -> None:
    """One rank: run the functions that come through the pipe, each inside a process group of its own."""
    torch.set_num_threads(1)
    runtime_ranks.tune_process()
    while (task := pipe.recv()) is not None:
        function, world, (port, name), arguments = task
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world)}
        try:
            # No file: tests limit how much a rank may write, and gloo's own threads use the store as well.
            store = dist.PrefixStore(name, dist.TCPStore("127.0.0.1", port, is_master=False))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            result = function(*arguments)
            dist.barrier()
            dist.destroy_process_group()
            pipe.send((True, result))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            return


class Ranks:
    """`ranks(4, function, *arguments)`: what `function` returns on each of 4 ranks. It is sent by name."""

    def __init__(self):
        self.count = 0
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.start()

    def start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)  # once for all ranks, in the process that they are forks of
        self.pipes, self.processes = [], []
        for rank in range(MOST_RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(rank, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def stop(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):  # it has ended already
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=2)
            process.kill()

    def __call__(self, world: int, function: Callable, *arguments: Any, timeout: float = 300) -> list:
        self.count += 1
        if self.count % MOST_GROUPS == 0:
            self.stop()
            self.start()
        for pipe in self.pipes[:world]:
            pipe.send((function, world, (self.store.port, str(self.count)), arguments))
        results, failed = [], None
        for rank, pipe in enumerate(self.pipes[:world]):
            try:
                done, result = pipe.recv() if pipe.poll(5 if failed else timeout) else (False, "no answer")
            except EOFError:
                done, result = False, "the process died"
            results.append(result)
            failed = failed or (None if done else f"rank {rank}: {result}")
        if failed:  # the others may wait for the failed one: start over with fresh processes
            self.stop()
            self.start()
            pytest.fail(failed, pytrace=False)
        return results


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    pool = Ranks()
    yield pool
    pool.stop()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that is converted or tokenised leaves the test's folder, and nothing is asked of the Hub."""
    import datasets  # not for every process of `ranks`

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents from nothing to several rows: most rows are mostly padding."""
    words, generator = ["def", "return", "x", "(y)", "+", "lambda", "é", "\n    "], random.Random(0)
    lengths = [0, 1, 1, 2, 3, 5, 8, 120, 300]
    texts = (" ".join(generator.choices(words, k=generator.choice(lengths))) for _ in range(300))
    path = tmp_path_factory.mktemp("corpus") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
