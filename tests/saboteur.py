"""train.py, sabotaged: `python saboteur.py WHAT@WHERE=NUMBER[:RANK],... [arguments of train.py]`

WHAT                                               WHERE: the NUMBERth call in this process (on this RANK)
  raise    an error that nobody expects              forward      of the model, in training
  hang     in C: no Python code runs any more,       evaluation   of the model, in an evaluation after a step
           signal handlers included                  catch-up     of the model, in one before the first step
  nap4     sleep 4 seconds                           save         of what writes a checkpoint
  hurry6   have ranks wait for each other only       set-up       of the process group
           6 seconds before the first step           load         of the checkpoint, if there is one
                                                     together     of what all ranks do together, in training
  wait     touch `waiting-<rank>` in the working     step         NUMBER is the step, just before the weights change
           directory until there is a file `go`

Whenever a signal has been handled, there is a file `signalled-<rank>`; before an error, `failed-<rank>`.
"""

import ctypes
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

import checkpoint
import model
import train
from runtime import monitor, ranks, rundir, shutdown

RANK = os.environ.get("RANK", "0")
calls = Counter()


def misbehave(what: str) -> None:
    if what == "raise":
        Path(f"failed-{RANK}").touch()
        raise RuntimeError(f"sabotage on rank {RANK}")
    while what == "hang":
        ctypes.PyDLL(None).sleep(100_000)  # a signal ends it early
    if what.startswith("hurry"):
        ranks.SETUP_TIMEOUT = timedelta(seconds=float(what.removeprefix("hurry")))
    if what.startswith("nap"):
        time.sleep(float(what.removeprefix("nap")))
    while what == "wait" and not Path("go").exists():
        Path(f"waiting-{RANK}").touch()
        time.sleep(0.01)


def sabotage(owner: Any, name: str, where: Callable[..., str], faults: dict[str, str]) -> None:
    """Look, before each call of `owner.name`, whether there is a fault at `where` of its arguments, =NUMBER."""
    original = getattr(owner, name)

    @wraps(original)
    def sabotaged(*args: Any, **kwargs: Any) -> Any:
        place = where(*args)
        calls[place] += 1
        for key in (place, f"{place}={calls[place]}"):
            misbehave(faults.get(key, "nothing"))
        return original(*args, **kwargs)

    setattr(owner, name, sabotaged)


def kind_of_forward(*_: Any) -> str:
    if torch.is_grad_enabled():
        return "forward"
    return "evaluation" if calls["forward"] else "catch-up"


def main() -> None:
    faults = {}
    for specification in sys.argv.pop(1).split(","):
        what, where = specification.split("@")
        where, _, rank = where.partition(":")
        if rank in ("", RANK):
            faults[where] = what
    sabotage(model.Llama, "forward", kind_of_forward, faults)
    sabotage(checkpoint.Saver, "write", lambda *_: "save", faults)
    sabotage(ranks, "init_distributed", lambda *_: "set-up", faults)
    sabotage(rundir.RunDirectory, "load", lambda *_: "load", faults)
    sabotage(monitor.Monitor, "check", lambda *_: "together", faults)
    sabotage(train, "learning_rate", lambda step, *_: f"step={step}", faults)
    handle = shutdown.Shutdown.on_signal

    def on_signal(*args: Any) -> None:
        handle(*args)
        Path(f"signalled-{RANK}").touch()

    shutdown.Shutdown.on_signal = on_signal
    train.main()


if __name__ == "__main__":
    main()
