"""A launcher of its own, as Ray or Lightning would be: `launcher.py WHAT [arguments of train.py]`, under torchrun.

It starts a process group, runs train.train() as a for loop and prints what came. WHAT happens on rank 1 at its third
event: "raise", "close", or "nothing".
"""

import contextlib
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist

import checkpoint
import configs
import train

EVENT = 3
SAVE_SECONDS = float(os.environ.get("SAVE_SECONDS", 0))


def slow_write(saver: checkpoint.Saver, *arguments: object) -> Path:
    """A save that is under way for a while."""
    time.sleep(SAVE_SECONDS)
    return write(saver, *arguments)


write, checkpoint.Saver.write = checkpoint.Saver.write, slow_write


def main() -> None:
    what, *arguments = sys.argv[1:]
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank = dist.get_rank()
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.closing(train.train(configs.load(arguments), torch.device("cpu"))) as events:
        for number, (kind, item) in enumerate(events, 1):
            Path(f"events-{rank}").open("a").write(f"{kind} {item if kind == 'checkpoint' else item['step']}\n")
            if number == EVENT and rank == 1 and what != "nothing":
                Path("failed-1").touch()
                if what == "raise":
                    raise KeyError("of the caller")
                break
    assert signal.getsignal(signal.SIGTERM) == before
    if what == "nothing":
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
