"""When to stop before the end: on a signal to any rank, when torchrun dies, when a rank has a problem or hangs.

A signal may reach one rank only, so nobody acts alone: `Shutdown.agreed` asks all ranks once a step, and all of them
save and leave after the same one.
"""

import contextlib
import faulthandler
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing import resource_tracker

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import parallel

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
GO_ON, STOP, FAIL = range(3)
DUMP_AFTER_SECONDS = 5  # beyond the time-out: the ranks that wait for the hanging one speak first, by failing


class Shutdown:
    """From now on signals ask this rank to stop instead of ending it. SIGINT twice ends it at once.

    torchrun passes a second SIGINT on as SIGTERM, so after a SIGINT that counts as well. Signals that are ignored, as
    under nohup, stay so.
    """

    def __init__(self, mesh: DeviceMesh, timeout_seconds: int):
        self.mesh, self.timeout_seconds, self.watching = mesh, timeout_seconds, False
        self.requested = self.interrupted = False
        self.torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.on_signal)

    def on_signal(self, number: int, frame: object) -> None:
        if self.interrupted and number in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + number)
        self.requested = True
        self.interrupted |= number == signal.SIGINT

    def agreed(self, problems: Sequence[Exception] = (), watch: bool = True) -> bool:
        """Whether any rank was asked to stop; a problem on any rank ends all of them with its message. Collective.

        It is also the sign of life. The first call with `watch` ends the long time-outs of the set-up; from then on a
        rank that does not come back here in time is ended, showing where it hangs.
        """
        orphaned = self.torchrun is not None and os.getppid() != self.torchrun
        vote = torch.tensor(FAIL if problems else STOP if self.requested or orphaned else GO_ON)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)  # on the CPU: it does not wait for a GPU
        if vote == FAIL:
            with parallel.errors_stop_all_ranks():
                if problems:
                    raise problems[0]
        if watch and not self.watching:  # all ranks have come here, so none is still busy with its set-up
            parallel.set_timeout(self.mesh, self.timeout_seconds)
        self.watching |= watch
        self.watch()
        return bool(vote == STOP)

    def watch(self) -> None:
        """End this rank, showing where it hangs, unless the next call of `agreed` comes in time."""
        if self.watching:
            faulthandler.dump_traceback_later(self.timeout_seconds + DUMP_AFTER_SECONDS, exit=True)

    def unwatch(self) -> None:
        """Until the next call of `watch` or `agreed`: a slow disk is no reason to end the job."""
        faulthandler.cancel_dump_traceback_later()


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
