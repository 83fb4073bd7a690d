"""When to stop before the end: on a signal to any rank, when torchrun dies, when a rank has a problem or hangs.

A signal may reach one rank only, so nobody acts alone: all ranks vote once a step, and all of them save and leave after
the same one.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from runtime import ranks
from runtime.monitor import say

GO_ON, STOP, FAIL = range(3)
DUMP_AFTER_SECONDS = 5  # beyond the time-out: the ranks that wait for the hanging one speak first, by failing


class Shutdown:
    """Within it signals ask this rank to stop instead of ending it. SIGINT twice ends it at once.

    torchrun passes a second SIGINT on as SIGTERM, so after a SIGINT that counts as well. Signals that are ignored, as
    under nohup, stay so, and outside the main thread none can be handled. Whoever owns the process lets a rank that
    hangs be ended; otherwise it only shows where, and the time-out of the process group raises. Leaving it, for
    whatever reason, waits for nobody: nothing stays armed, and signals and time-outs are again what they were.
    """

    def __init__(self, mesh: DeviceMesh, timeout_seconds: int, owns_process: bool):
        self.mesh, self.timeout_seconds, self.owns_process = mesh, timeout_seconds, owns_process
        self.watching = self.requested = self.interrupted = False
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.handlers, self.timeout_before = {}, ranks.timeout_of_group()
        self.in_main_thread = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> "Shutdown":
        if not self.in_main_thread:
            say("outside the main thread: signals do not stop this run, it goes on from its last checkpoint")
        for number in ranks.SIGNALS if self.in_main_thread else ():
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        self.rest()
        if self.timeout_before is not None:
            ranks.set_timeout(self.timeout_before)
        with contextlib.suppress(ValueError):  # a generator may be closed by another thread than its own
            for number, handler in self.handlers.items():
                signal.signal(number, handler)

    def on_signal(self, number: int, frame: object) -> None:
        if self.interrupted and number in (signal.SIGINT, signal.SIGTERM):
            if not self.owns_process:
                raise KeyboardInterrupt
            os._exit(128 + number)
        self.requested = True
        self.interrupted |= number == signal.SIGINT

    def vote(
        self, problems: Sequence[BaseException] = (), writing: bool = False, watch: bool = True, final: bool = False
    ) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether no rank is `writing` any more. Collective, on the CPU.

        A problem on any rank is raised on all. It is also the sign of life: the first vote with `watch` ends the long
        time-outs of the set-up, and from then on a rank that does not come back here in time is noticed. `final`: it
        is too late to stop anything.
        """
        orphaned = self.torchrun is not None and os.getppid() != self.torchrun
        wish = FAIL if problems else STOP if self.requested or orphaned else GO_ON
        votes = torch.tensor([wish, writing])
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)  # on the CPU: it does not wait for a GPU
        wish, writing = votes.tolist()
        if wish == FAIL:
            ranks.together(lambda: raise_first(problems))
        if watch and not self.watching:  # all ranks have come here, so none is still busy with its set-up
            ranks.set_timeout(timedelta(seconds=self.timeout_seconds), self.mesh)
        self.watching |= watch
        self.watch()
        return wish == STOP and not final, not writing

    def agreed(self, watch: bool = True, final: bool = False) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return self.vote(watch=watch, final=final)[0]

    def watch(self) -> None:
        """Show where this rank hangs, and end it if that is ours to do, unless the next vote comes in time."""
        if self.watching:
            seconds, screen = self.timeout_seconds + DUMP_AFTER_SECONDS, sys.__stderr__ or sys.stderr
            faulthandler.dump_traceback_later(seconds, exit=self.owns_process, file=screen)

    def rest(self) -> None:
        """The last vote has been: nobody is watched any more."""
        self.watching = False
        faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def unwatched(self) -> Iterator[None]:
        """A slow disk is no reason to end the job."""
        faulthandler.cancel_dump_traceback_later()
        yield
        self.watch()


def raise_first(problems: Sequence[BaseException]) -> None:
    if problems:
        raise problems[0]
