"""The same training under Lightning's Trainer: our model, our plan, our rows, their loop.

    python -m integrations.lightning_trainer [CONFIG.toml] [--section.key=value ...]      one process
    torchrun --standalone --nproc_per_node=4 -m integrations.lightning_trainer ... --parallel.tp=2

From this project's folder; the arguments are train.py's. The steps are in RUN.DIR/lightning_logs/version_N/metrics.csv,
with a new N each time, counted from 0. It has been run on CPUs only; GPUs are used where there are any.

What the Trainer does for you: the loop with its micro-steps, the progress bar, loggers and callbacks; and with
`ModelParallelStrategy` checkpoints in torch's distributed format, which are left out here. The strategy's mesh,
`self.device_mesh`, has the axes (data_parallel, tensor_parallel), and what `configure_model` leaves on the meta device
it fills by `to_empty` and `reset_parameters` of each layer, which writes no RoPE table. So `configure_model` uses our
mesh, which has dp_replicate too, and fills everything itself. Mixed precision, activation checkpointing and compile
belong to our plan (`parallel.*`): leave the Trainer's precision at 32 bits. Clipping is not left to the Trainer, as it
comes after the division by the tokens of the whole global batch, and takes the same sum over ranks.

What train.py does and this file does not: it resumes, with the rows that come next, and saves, also in the background;
saves before it stops when asked by a signal; evaluates; skips a step that is not finite; notices a rank that hangs
after parallel.timeout_seconds, here after an hour; has a run directory with metrics.jsonl, wandb, a profile; with
dp_replicate it sums gradients over the replicas once a step, here once a micro-step. Keys about these change nothing
here, except that train.log_every is the logger's.
"""

import sys
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy

import configs
import data
import parallel
from corpus import opened as open_corpus
from model import IGNORE_INDEX, Llama
from runtime import ranks
from train import learning_rate, make_optimizer


class LlamaModule(LightningModule):
    """`config` is settled. `self.device_mesh`, which is Lightning's, has no axis for copies: `mesh` is ours."""

    def __init__(self, config: configs.Config, mesh: torch.distributed.DeviceMesh):
        super().__init__()
        self.config, self.mesh = config, mesh
        self.sums = torch.zeros(2, dtype=torch.float64, device=mesh.device_type)  # of loss and tokens, in this step

    def configure_model(self) -> None:
        if hasattr(self, "model"):  # Lightning calls this once more for each fit, validate or test
            return
        with torch.device("meta"):
            self.model = Llama(self.config.model)
        parallel.parallelize(self.model, self.mesh, self.config.parallel)
        self.model.to_empty(device=self.mesh.device_type)
        self.model.init_weights(self.config.train.seed, parallel.place_shard)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.config.optim)

    def training_step(self, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with parallel.loss_context(self.mesh):
            loss = self.model(*batch)  # input_ids, targets and perhaps positions; a sum over tokens
        self.sums += torch.stack((parallel.to_local(loss.detach()), (batch[1] != IGNORE_INDEX).sum()))
        return loss * self.trainer.accumulate_grad_batches  # by which Lightning divides

    def backward(self, loss: torch.Tensor) -> None:
        with parallel.loss_context(self.mesh):
            loss.backward()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        optim, step = self.config.optim, self.global_step + 1
        loss, tokens = self.sums / self.mesh["tp"].size()  # TP peers have the same rows
        loss, tokens, square = parallel.sum_over_ranks(loss, tokens, parallel.gradient_square(self.model))
        grad_norm = square.sqrt() / tokens
        clip = (optim.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if optim.grad_clip > 0 else 1.0
        parallel.scale_gradients(self.model, clip / tokens)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.config.train.steps, optim) * group.get("lr_ratio", 1.0)
        self.log_dict({"loss": loss / tokens, "grad_norm": grad_norm})
        self.sums.zero_()


def train(config: configs.Config) -> None:
    """All ranks call it. What a user got wrong is raised as `ranks.UserError`, on all alike."""
    if config.checkpoint.init_from:
        raise ranks.UserError("checkpoint.init_from: only train.py starts from other weights: leave it out")
    # Lightning 2.6 asks torch 2.13 in a way that is deprecated there
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", module="lightning")
    mesh = parallel.build_mesh(config.parallel, ranks.init_distributed(config.train.deterministic))
    dp_rank, dp_size = parallel.dp_rank_and_size(mesh)
    size, rows = config.train.global_batch_size, config.train.micro_batch_size
    devices, nodes = ranks.local_world_size(), ranks.world_size() // ranks.local_world_size()
    where = {"accelerator": mesh.device_type, "devices": devices, "num_nodes": nodes}
    strategy = ModelParallelStrategy(data_parallel_size=dp_size, tensor_parallel_size=mesh["tp"].size())
    # its one epoch ends with the rows, after train.steps
    loop = {"max_epochs": 1, "accumulate_grad_batches": size // (rows * dp_size), "use_distributed_sampler": False}
    log = {"logger": CSVLogger(config.run.dir), "log_every_n_steps": config.train.log_every}
    trainer = Trainer(strategy=strategy, enable_checkpointing=False, **where, **loop, **log)
    with open_corpus(config.data, Path(config.run.dir), size, None, lambda: 0) as corpus:
        config = configs.settle(config, corpus.vocabulary, corpus.num_rows)
        order = (corpus.source, 1, config.train.steps, size, rows, config.train.seed, dp_rank, dp_size)
        with data.batches(*order, config.data.num_workers, torch.device(mesh.device_type)) as batches:
            trainer.fit(LlamaModule(config, mesh), batches)


def main() -> None:
    try:
        ranks.check_launcher()
        train(configs.load(sys.argv[1:]))
    except (ranks.UserError, ranks.PeerFailed) as error:
        ranks.end_process(error)
    ranks.leave_together()


if __name__ == "__main__":
    main()
