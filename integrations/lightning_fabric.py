"""The same training under Lightning Fabric: our model, our plan, our rows, and a loop that is yours to write.

    python -m integrations.lightning_fabric [CONFIG.toml] [--section.key=value ...]       one process
    torchrun --standalone --nproc_per_node=4 -m integrations.lightning_fabric ... --parallel.tp=2

From this project's folder; the arguments are train.py's. It prints a line of JSON for each step. It has been run on
CPUs only; GPUs are used where there are any.

What Fabric does for you: `ModelParallelStrategy` makes a module on the meta device, hands it to your function and wraps
what comes back; `backward`, optimizers, loggers, callbacks and `fabric.save` are called the same way under each of its
strategies. Its own mesh has the axes (data_parallel, tensor_parallel), and what a function leaves on the meta device it
fills by `to_empty` and `reset_parameters` of each layer, which writes no RoPE table. So `parallelize` uses our mesh,
which has dp_replicate too, and fills everything itself. Mixed precision, activation checkpointing and compile belong to
our plan (`parallel.*`): leave Fabric's precision at 32 bits.

What train.py does and this file does not: it resumes, with the rows that come next, and saves, also in the background;
saves and stops when asked by a signal; evaluates; skips a step that is not finite; notices a rank that hangs after
parallel.timeout_seconds, here after an hour; has a run directory with metrics.jsonl, wandb, a profile; with
dp_replicate it sums gradients over the replicas once a step, here once a micro-step. Keys about these change nothing
here.
"""

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy

import configs
import data
import parallel
from corpus import opened as open_corpus
from model import IGNORE_INDEX, Llama
from runtime import ranks
from train import learning_rate, make_optimizer


def train(config: configs.Config) -> None:
    """All ranks call it. What a user got wrong is raised as `ranks.UserError`, on all alike."""
    if config.checkpoint.init_from:
        raise ranks.UserError("checkpoint.init_from: only train.py starts from other weights: leave it out")
    device = ranks.init_distributed(config.train.deterministic)
    mesh = parallel.build_mesh(config.parallel, device)
    tp, (dp_rank, dp_size) = mesh["tp"].size(), parallel.dp_rank_and_size(mesh)

    def parallelize(model: Llama, _: object) -> Llama:
        parallel.parallelize(model, mesh, config.parallel)
        model.to_empty(device=device)
        model.init_weights(config.train.seed, parallel.place_shard)
        return model

    strategy = ModelParallelStrategy(parallelize, data_parallel_size=dp_size, tensor_parallel_size=tp)
    devices, nodes = ranks.local_world_size(), ranks.world_size() // ranks.local_world_size()
    fabric = Fabric(accelerator=device.type, devices=devices, num_nodes=nodes, strategy=strategy)
    fabric.launch()
    size, rows = config.train.global_batch_size, config.train.micro_batch_size
    with open_corpus(config.data, Path(config.run.dir), size, None, lambda: 0) as corpus:
        config = configs.settle(config, corpus.vocabulary, corpus.num_rows)
        optim, steps = config.optim, config.train.steps
        with fabric.init_module(empty_init=True):  # on the meta device
            model = fabric.setup_module(Llama(config.model))
        optimizer = fabric.setup_optimizers(make_optimizer(model, optim))
        order = (corpus.source, 1, steps, size, rows, config.train.seed, dp_rank, dp_size, config.data.num_workers)
        with data.batches(*order, device) as batches:
            for step in range(1, steps + 1):
                loss, tokens = torch.zeros(2, dtype=torch.float64, device=device)
                for input_ids, targets, *positions in islice(batches, size // (rows * dp_size)):
                    with parallel.loss_context(mesh):
                        micro_loss = model(input_ids, targets, *positions)  # a sum over tokens
                        fabric.backward(micro_loss)
                    loss += parallel.to_local(micro_loss.detach())
                    tokens += (targets != IGNORE_INDEX).sum()
                loss, tokens, square = parallel.sum_over_ranks(loss / tp, tokens / tp, parallel.gradient_square(model))
                grad_norm = square.sqrt() / tokens
                clip = (optim.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if optim.grad_clip > 0 else 1.0
                parallel.scale_gradients(model, clip / tokens)
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, optim) * group.get("lr_ratio", 1.0)
                optimizer.step()
                optimizer.zero_grad()
                if fabric.is_global_zero:
                    print(json.dumps({"step": step, "loss": (loss / tokens).item(), "grad_norm": grad_norm.item()}))


def main() -> None:
    try:
        ranks.check_launcher()
        train(configs.load(sys.argv[1:]))
    except (ranks.UserError, ranks.PeerFailed) as error:
        ranks.end_process(error)
    ranks.leave_together()


if __name__ == "__main__":
    main()
