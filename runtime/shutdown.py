"""When to stop before the end: on a signal to any rank, when torchrun dies, when a rank has a problem or hangs.

A signal may reach one rank only, so nobody acts alone: all ranks vote once a step, and all of them save and leave after
the same one. What goes on later is then the same run (law 2).
"""

import contextlib
import faulthandler
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.launcher.api import LaunchConfig

from runtime import ranks
from runtime.monitor import say

GO_ON, STOP, FAIL = range(3)
DUMP_AFTER_SECONDS = 5  # beyond the time-out: the ranks that wait for the hanging one speak first, by failing
POLL_SECONDS = 0.1  # between two looks at whether a file is there


class Stopped(Exception):
    """On all ranks alike: they were asked to stop, or have to, while they waited for something."""


class Shutdown:
    """Within it signals ask this rank to stop instead of ending it. SIGINT twice ends it at once.

    torchrun passes a second SIGINT on as SIGTERM, so after a SIGINT that counts as well. Signals that are ignored, as
    under nohup, stay so, and outside the main thread none can be handled. Whoever owns the process lets a rank that
    hangs be ended; otherwise it only shows where, and the time-out of the process group raises. Leaving it, for
    whatever reason, waits for nobody: nothing stays armed, and signals and time-outs are again what they were.

    `failure` is what the ranks have to stop for, once there is something: to be raised when they have saved.
    """

    def __init__(self, mesh: DeviceMesh, timeout_seconds: int, owns_process: bool, tell: Callable[[str], None] = say):
        self.mesh, self.timeout_seconds, self.owns_process = mesh, timeout_seconds, owns_process
        self.tell = tell  # what is waited for
        self.watching = self.requested = self.interrupted = self.told_time = False
        self.failure: ranks.UserError | None = None
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.handlers, self.timeout_before = {}, ranks.timeout_of_group()
        self.seconds: list[float] = []  # of each rank, as `vote` was told them

    def __enter__(self) -> "Shutdown":
        ranks.set_timeout(ranks.SETUP_TIMEOUT, self.mesh)
        in_main_thread = threading.current_thread() is threading.main_thread()
        if not in_main_thread:
            say("outside the main thread: signals do not stop this run, it goes on from its last checkpoint")
        for number in ranks.SIGNALS if in_main_thread else ():
            if signal.getsignal(number) != signal.SIG_IGN:
                self.handlers[number] = signal.signal(number, self.on_signal)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.rest()
        if error is not None and self.owns_process:
            ranks.call_the_roll(error)
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
        self,
        problems: Sequence[BaseException] = (),
        writing: bool = False,
        watch: bool = True,
        final: bool = False,
        seconds: float = 0.0,
    ) -> tuple[bool, bool]:
        """Whether any rank was asked to stop, and whether no rank is `writing` any more. Collective, on the CPU.

        A problem on any rank is raised on all. It is also the sign of life: the first vote with `watch` ends the long
        time-outs of the set-up, and from then on a rank that does not come back here in time is noticed. `final`: it
        is too late to stop anything. `seconds`: what this rank took for work that all do alike, see `slowest`.
        """
        orphaned = self.torchrun is not None and os.getppid() != self.torchrun
        asked = self.requested or signal.sigpending() & self.handlers.keys()  # those that are held are not handled yet
        wish = FAIL if problems else STOP if asked or orphaned or self.failure else GO_ON
        votes = torch.zeros(2 + dist.get_world_size(), dtype=torch.float64)
        votes[0], votes[1], votes[2 + dist.get_rank()] = wish, writing, seconds
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)  # on the CPU: it does not wait for a GPU
        wish, writing, *of_ranks = votes.tolist()
        self.seconds = of_ranks if any(of_ranks) else self.seconds
        if wish == FAIL:
            ranks.together(lambda: raise_first(problems))
        if watch and not self.watching:  # all ranks have come here, so none is still busy with its set-up
            self.watching = True
            ranks.set_timeout(timedelta(seconds=self.timeout_seconds), self.mesh)
        self.watch()
        return wish == STOP and not final, not writing

    def agreed(self, watch: bool = True, final: bool = False) -> bool:
        """Whether any rank was asked to stop. Collective."""
        return self.vote(watch=watch, final=final)[0]

    def meet(self, lacking: Callable[[], str | None]) -> None:
        """Wait until no rank lacks anything any more. Collective; `lacking` names what this one waits for.

        One vote follows the other, so waiting is no hang, and signals get through. Raises Stopped, on all ranks alike,
        when one was asked to stop, or when `lacking` failed on one, which is then the `failure`.
        """
        told = ""
        while True:
            name, problems = None, []
            try:
                name = lacking()
            except Exception as error:
                problems.append(error)
            try:
                stopping, ready = self.vote(problems, name is not None, watch=self.watching)
            except ranks.UserError as error:
                self.failure = error
            if self.failure or stopping:
                raise Stopped
            if told != (told := "" if ready else name or "another node"):
                self.tell(told)
            if ready:
                return
            time.sleep(POLL_SECONDS)

    def slowest(self) -> dict[str, float | None]:
        """As of the last vote, of several ranks: which took longest, and how many times as long as the median one."""
        if dist.get_world_size() == 1:
            return {}
        if not self.seconds or min(self.seconds) <= 0:
            return {"slowest_rank": None, "slowest_ratio": None}
        most, median = max(self.seconds), sorted(self.seconds)[(len(self.seconds) - 1) // 2]
        return {"slowest_rank": self.seconds.index(most), "slowest_ratio": most / median}

    def check_time(self, step_seconds: float, save_seconds: float) -> None:
        """Say so, once, if torchrun would end its processes before a step and a save are over."""
        if self.torchrun is None or self.told_time or not save_seconds:
            return
        known, needed = "shutdown_timeout" in LaunchConfig.__dataclass_fields__, step_seconds + save_seconds
        patience = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) if known else 30
        self.told_time = needed >= patience
        if not self.told_time:
            return
        variable = f"set TORCH_ELASTIC_SHUTDOWN_TIMEOUT={2 * math.ceil(needed)} for torchrun, or " if known else ""
        say(
            f"WARNING: a stop takes up to {needed:.0f} s (a step {step_seconds:.0f}, a save {save_seconds:.0f}), and "
            f"torchrun kills its processes {patience} s after it was sent a signal, so that the save would be lost: "
            f"{variable}send the signal to a process of train.py instead"
        )

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
        with ranks.patience():
            yield
        self.watch()


def raise_first(problems: Sequence[BaseException]) -> None:
    if problems:
        raise problems[0]
