"""The same training under Ray Train: Ray starts the workers and their process group, train.train() does the rest.

    python -m integrations.ray_train --num-workers=4 [CONFIG.toml] [--section.key=value ...]

From this project's folder; all other arguments are train.py's. It has been run on CPUs only; GPUs are used where there
are any.

What Ray does: it finds the machines, starts a worker for each rank, and starts all of them again when one dies, up to
`--max-failures` times. Every line of metrics.jsonl is reported to it, for callbacks (`RunConfig(callbacks=...)`); it
keeps none without checkpoints of its own. What train() does as ever: it goes on from the newest checkpoint in the run
directory, with the rows that come next, whether Ray has started the workers again or you have. On several machines the
run directory must be shared; Ray's own, `<run.dir>-ray`, lies beside it.
"""

import argparse
import logging
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

import configs
from runtime import ranks


def set_up() -> None:
    """In each process that Ray starts."""
    sys.path.insert(0, str(Path(__file__).parent.parent))  # the project is no package: this is where its modules are
    # for Ray's own processes, which would not know which one is meant where a machine has several
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    # without Ray's dashboard, which it asks once a second, it warns once a second
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)


def worker(given: dict[str, Any]) -> str | None:
    """On each worker, in a thread; returns what the user got wrong, which Ray would try again if it was raised."""
    os.chdir(given["folder"])  # paths are meant from where the command was given
    import train

    context = ray.train.get_context()
    torch.set_num_threads(max(1, ranks.cores() // context.get_local_world_size()))
    try:
        world, local_world = context.get_world_size(), context.get_local_world_size()
        config = ranks.together(partial(configs.load, given["arguments"], world, local_world))
        for kind, item in train.train(config, ray.train.torch.get_device()):
            if kind == "line":
                ray.train.report(item)
    except ranks.UserError as error:  # on all workers alike
        return str(error)
    return None


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--num-workers", type=int, default=4, help="ranks: one a GPU, or processes on a CPU (4)")
    parser.add_argument("--max-failures", type=int, default=1, help="how often workers are started again (1)")
    own, arguments = parser.parse_known_args()
    if own.num_workers < 1:
        sys.exit(f"error: --num-workers={own.num_workers} is below 1")
    try:  # before anything is started
        storage = Path(f"{Path(configs.load(arguments, own.num_workers).run.dir).absolute()}-ray")
        was_there = storage.exists()
        storage.mkdir(parents=True, exist_ok=True)
    except (ranks.UserError, OSError) as error:
        sys.exit(f"error: {error}")
    # without a cluster, on this machine, ranks share the cores as under torchrun
    address = os.environ.get("RAY_ADDRESS") or "local"
    cores = max(ranks.cores(), own.num_workers) if address == "local" else None
    ray.init(address, num_cpus=cores, runtime_env={"worker_process_setup_hook": set_up})
    on_gpu = ray.cluster_resources().get("GPU", 0) > 0
    trainer = TorchTrainer(
        worker,
        train_loop_config={"arguments": arguments, "folder": str(Path.cwd())},
        scaling_config=ScalingConfig(num_workers=own.num_workers, use_gpu=on_gpu),
        # train() votes with CPU tensors, also on GPUs
        torch_config=TorchConfig("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout_s=ranks.SETUP_TIMEOUT.seconds),
        run_config=RunConfig(storage.name, str(storage.parent), failure_config=FailureConfig(own.max_failures)),
    )
    if (wrong := trainer.fit().return_value) is not None:
        if not was_there:
            shutil.rmtree(storage)
        sys.exit(f"error: {wrong}")


if __name__ == "__main__":
    main()
