"""Ranks: how they start, how they agree, and how they fail: together, with one message (law 7).

What one rank alone decides (is there a checkpoint? is the disk full?) would let the others wait for it for ever. So
whatever may go wrong on one rank goes through a function of this file, which all ranks call alike:

    together(f)          every rank runs f
    on_rank_0(f)         rank 0 runs f; its result is everybody's
    on_each_node(f)      the first rank of each node runs f; its result is that of its node
    same_everywhere(...) a value that must not differ

They return on all ranks or raise on all ranks. `f` must not communicate: a rank that failed would not take part.
"""

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout  # there is no public name for it

SETUP_TIMEOUT = timedelta(hours=1)  # how long ranks wait for each other before the first step, which may compile
CONNECT_TIMEOUT = timedelta(minutes=10)  # to find the others at all
COLLECT_EVERY = 100  # steps
WORK_TIMEOUT = timedelta(hours=12)  # and while one works for all: tokenises a large corpus, writes to a slow disk
ROLL_CALL_SECONDS = 3  # between the first rank that gives up waiting and the last one, about
PEER_PATIENCE_SECONDS = 30  # how long a silent rank waits to be ended after another one has told why
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # that ask a run to stop


class UserError(ValueError):
    """What a user got wrong: value, rule and remedy. It is raised on all ranks alike, and `main` says it once."""


class PeerFailed(RuntimeError):
    """Another rank met a bug: the message names it, and that rank shows its traceback."""


# ---------------------------------------------------------------------------------------------------------------------
# Agree and fail together


def gather(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """Every rank's value, on every rank. Small ones: each rank receives them all."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Any, source: int = 0) -> Any:
    """The value of one rank, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def together(function: Callable[[], Any] | None, group: dist.ProcessGroup | None = None) -> Any:
    """This rank's `function()`, once every rank has done its own; None where there is nothing to do.

    Where a rank raised UserError or OSError, all raise one UserError. Where it raised anything else, which is a bug and
    outranks that, it raises the same again and the others raise PeerFailed.
    """
    result = error = None
    try:
        result = function() if function else None
    except Exception as caught:
        error = caught
    by_user = isinstance(error, UserError | OSError)
    text = (str(error) or repr(error)) if by_user else f"{type(error).__name__}: {error}"
    reports = gather(None if error is None else (by_user, text), group)  # texts: an exception may not pickle
    bugs = [f"rank {rank}: {report[1]}" for rank, report in enumerate(reports) if report and not report[0]]
    if bugs and error is not None and not by_user:
        raise error
    if bugs:
        raise PeerFailed(bugs[0])
    messages = [report[1] for report in reports if report]
    if messages:
        raise UserError(messages[0]) from error
    return result


def on_rank_0(function: Callable[[], Any]) -> Any:
    """Rank 0's `function()`, on every rank. Errors as in `together`."""
    return broadcast(together(function if dist.get_rank() == 0 else None))


def on_each_node(function: Callable[[], Any]) -> Any:
    """On every rank, the `function()` of its node's first rank. Errors as in `together`."""
    leaders = node_leaders()
    own = leaders[dist.get_rank()]
    result = together(function if dist.get_rank() == own else None)
    for leader in sorted(set(leaders)):  # one after the other: less memory than all results at once
        of_leader = broadcast(result, leader)
        if leader == own:
            result = of_leader
        del of_leader
    return result


def same_everywhere(what: str, value: str, remedy: str) -> None:
    """Raise UserError if `value` is not the same on all ranks."""
    if len(set(gather(hashlib.sha256(value.encode()).hexdigest()))) > 1:
        raise UserError(f"{what} is not the same on all nodes: {remedy}")


def node_leaders() -> list[int]:
    """By rank, the first rank on the same node. Asked of the nodes: a launcher need not set any variable."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")  # on Linux; containers on one machine have names of their own
    names = gather((socket.gethostname(), boot_id.read_text() if boot_id.exists() else ""))
    return [names.index(name) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Start and end a process


def world_size() -> int:
    """Ranks in the job, known before there is a process group: torchrun says so in the environment."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_world_size() -> int:
    """Ranks on this node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def cores() -> int:
    """Which this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_launcher() -> None:
    """Raise UserError where SLURM has started several tasks that do not know of each other."""
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if "RANK" not in os.environ and tasks != "1":
        raise UserError(
            f"SLURM_NTASKS={tasks} without RANK: each task would be a run of its own; use integrations/slurm.sh, which "
            "starts torchrun, or let each task say first\n"
            "  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS\n"
            "  export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))\n"
            '  export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500'
        )


def tune_process() -> None:
    """What training on a CPU asks of a Linux with glibc. Call it first: threads inherit how they are scheduled."""
    if hasattr(os, "SCHED_BATCH"):
        # A thread that wakes up waits for its turn. gloo's network thread would often push aside the very thread that
        # holds the lock it wants, and spin until that one's next turn.
        with contextlib.suppress(PermissionError):  # in a sandbox
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    if platform.libc_ver()[0] == "glibc":
        # What a step frees is kept: the next one would have every page of its tensors faulted in again.
        libc, m_trim_threshold, m_mmap_threshold = ctypes.CDLL(None), -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 2**30)  # bytes
        libc.mallopt(m_trim_threshold, -1)  # never


def raise_file_limit() -> None:
    """As many open files as the system lets a process have: gloo keeps a socket per peer and group."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says "no limit" and accepts less
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def init_distributed(deterministic: bool = False) -> torch.device:
    """Start the process group, also for one process; returns this rank's device: CUDA with NCCL, else CPU with gloo."""
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    raise_file_limit()
    gc.freeze()  # what the imports have made is no garbage: without it the collector has little to walk through
    gc.enable()  # train.py imports without it
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:  # torchrun sets OMP_NUM_THREADS=1 whatever the number of cores
        torch.set_num_threads(max(1, cores() // local_world_size()))
        tune_process()
    store, rank, size = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=CONNECT_TIMEOUT))
        except dist.DistError as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"rank {os.environ['RANK']} did not meet the others at {address} within {CONNECT_TIMEOUT}: on every "
                f"node that name must be the first node's, and not, as in many an /etc/hosts, 127.0.1.1 ({error})"
            ) from error
        # torchrun --max-restarts keeps its store, and in it the addresses of ranks that are gone (pytorch#135712). Only
        # on a single node do all ranks know the same number of restarts.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if size == local_world_size() else "any"
        store = dist.PrefixStore(f"restart_{restarts}", store)
    backend, gpu = ("cpu:gloo,cuda:nccl", device) if on_gpu else ("gloo", None)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=SETUP_TIMEOUT, device_id=gpu)
    return device


def collect_garbage(steps_taken: int, owns_process: bool) -> None:
    """Freeze what is there after the first step, and from then on collect on all ranks at the same step, not before.

    Each rank would stop at moments of its own, and with many ranks one of them always does, for which all wait. In a
    process of somebody else the collector is left alone.
    """
    if not owns_process or steps_taken == 0:
        return
    gc.disable()
    if steps_taken == 1:
        gc.collect()
        gc.freeze()
    elif steps_taken % COLLECT_EVERY == 0:
        gc.collect()


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Processes that are started inside never see the signals: torchrun sends them to loader workers and wandb too."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    resource_tracker.ensure_running()  # multiprocessing's helper; its start unblocks SIGINT and SIGTERM here, so:
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_group(deterministic: bool) -> None:
    """Raise UserError, on all ranks, unless there is a process group that can reduce CPU tensors.

    `deterministic`: and torch is set to use deterministic algorithms only, which is up to whoever owns the process.
    """
    if not dist.is_initialized():
        raise UserError("there is no process group: start train.py, or call torch.distributed.init_process_group first")
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        if "No backend type" not in str(error):  # a peer that has died, say
            raise
        raise UserError(
            f"the process group ({dist.get_backend()}) cannot reduce CPU tensors, as votes and asynchronous saves do: "
            'start it with backend="cpu:gloo,cuda:nccl"'
        ) from error
    together(partial(check_switch, deterministic))


def check_switch(deterministic: bool) -> None:
    if deterministic and not torch.are_deterministic_algorithms_enabled():
        raise UserError(
            "train.deterministic=true: call torch.use_deterministic_algorithms(True) before, or leave it out"
        )


def timeout_of_group() -> timedelta | None:
    """How long a collective of the default group waits for the slowest rank; None where its backend does not say."""
    try:
        return dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    except (AttributeError, RuntimeError):  # there is no public name for it
        return None


def set_timeout(timeout: timedelta, mesh: DeviceMesh | None = None) -> None:
    """From now on, for the default group and those of the mesh, which do not inherit it (pytorch#119574).

    Local: it waits for nobody.
    """
    for group in (None, *(mesh.get_all_groups() if mesh else ())):
        _set_pg_timeout(timeout, group)


@contextlib.contextmanager
def patience() -> Iterator[None]:
    """What takes long is no hang: within it the default group waits WORK_TIMEOUT, and then as long as before."""
    before = timeout_of_group()
    set_timeout(WORK_TIMEOUT)
    try:
        yield
    finally:
        if before is not None:
            set_timeout(before)


def call_the_roll(error: BaseException) -> None:
    """If ranks have waited in vain: say on standard error which did not come. Through the store, and by one rank.

    A rank that gives up closes its connections, so that others hear of that instead. Who has waited itself gives them
    a moment to say that they are there, and waits for no one longer than that.
    """
    waited = "imed out" in str(error)  # as gloo and NCCL put it
    lost = isinstance(error, RuntimeError) and not isinstance(error, PeerFailed)  # a disk may time out as well
    if not lost or not (waited or " by peer" in str(error)):  # closed, or reset
        return
    with contextlib.suppress(dist.DistError):  # torchrun may be gone, and with it the store
        store, own, everyone = dist.distributed_c10d._get_default_store(), dist.get_rank(), range(dist.get_world_size())
        store.set(f"here/{own}", "")
        if not waited:
            return
        store.set(f"waited/{own}", "")
        time.sleep(ROLL_CALL_SECONDS)
        missing = [rank for rank in everyone if not store.check([f"here/{rank}"])]
        if own == next(rank for rank in everyone if store.check([f"waited/{rank}"])):
            names = ", ".join(map(str, missing)) or "none: one was late, or the network is slow"
            print(f"waited {timeout_of_group()} in vain. Ranks that did not come: {names}", file=sys.stderr, flush=True)


def leave_together() -> None:
    """The end of the process group. Whoever calls has let go of the model.

    gloo sometimes aborts a process that exits while tensors of a model are alive: collect the cycles first. What is
    left is the imports', which the interpreter need not walk through once more when it ends.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    dist.barrier()
    dist.destroy_process_group()


def end_process(error: UserError | PeerFailed) -> NoReturn:
    """End with status 2 and one message for a person. Every rank comes here, and rank 0 speaks.

    The others keep silent and wait to be ended: torchrun ends everybody as soon as one process exits, and the message
    would be lost. If nobody ended them, the error is this node's alone, or this rank's: its first rank speaks first.
    Where a peer met a bug, that one shows it.
    """
    is_main, failed = int(os.environ.get("RANK", 0)) == 0, isinstance(error, PeerFailed)
    if failed or not is_main:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PEER_PATIENCE_SECONDS + (0 if int(os.environ.get("LOCAL_RANK", 0)) == 0 else ROLL_CALL_SECONDS))
    sys.stdout.flush()
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(2)
