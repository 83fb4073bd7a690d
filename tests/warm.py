"""torchrun which imports torch before it starts ranks, and has them as forks: its own --run-path and --start-method.

More than half of a tiny run's time is imports, where four ranks share two cores. Where a test is about what torchrun
does, or about a start, it takes torchrun itself.
"""

import gc
import importlib
import sys
from pathlib import Path

IMPORTED = [
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
]
OPTIONS = ("--run-path", "--start-method=fork")

if __name__ == "__main__":
    gc.disable()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()
    sys.path[0] = str(Path(__file__).parent.parent)  # as for `python train.py`
    from torch.distributed.run import main

    main()
