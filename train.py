"""Pretrain a Llama with tensor parallelism x FSDP2.

    python train.py                                                        one process: a CPU, or one GPU
    torchrun --standalone --nproc_per_node=4 train.py --parallel.tp=2      2 x 2 mesh on one node
    torchrun --nproc_per_node=8 train.py configs/llama3_8b.toml            8 GPUs; two nodes: docs/cluster.md

Arguments: [CONFIG.toml] [--section.key=value ...]; `--help` lists every key. Running the same command again resumes.
Other launchers call `train(config, device)` in a process group of their own.
"""

import gc
import math
import signal
import sys

from runtime import STARTED  # before the slow imports

if __name__ == "__main__":
    gc.disable()  # they leave no garbage; ranks.init_distributed starts the collector again

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record

import checkpoint
import configs
import data
import parallel
from configs import Config, OptimConfig, TrainConfig
from corpus import opened as open_corpus
from model import IGNORE_INDEX, Llama, flops_per_token, parameter_count
from runtime import ranks
from runtime.monitor import Meter, Monitor, SkippedSteps, StartUp, say, summary
from runtime.rundir import RunDirectory
from runtime.shutdown import Shutdown, Stopped


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Of optimizer step `step`, counted from 1: linear warm-up, then cosine to min_lr_ratio * lr at the last step."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    floor = optim.min_lr_ratio * optim.lr
    return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: Llama, optim: OptimConfig) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices only, not on norms.

    Another optimizer goes here, and nowhere else; one with less state than two moments lowers configs.STATE_BYTES too.
    What the loop, checkpoints and explain.py rely on: it honours `found_inf` (a step whose gradient is not finite
    changes nothing); its state is tensors under fixed names, of the parameter's shape or scalars, and can be made by a
    step with zero gradients; the parameters come in the same order on all ranks. A group may carry its own share of the
    learning rate, as "lr_ratio". Whole matrices come from `parallel.whole`.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


@torch.no_grad()
def evaluate(model: Llama, mesh: DeviceMesh, train: TrainConfig, source: data.Source, abandon: Callable) -> dict | None:
    """Mean loss per token over the held-out rows, each once, on any mesh; None if all ranks agree to abandon it."""
    rows, device = source.open(0), model.rope.device
    order = data.permutation(len(rows), 0, 0)[: train.eval_batches * train.global_batch_size or None]
    batches = data.deal(order, train.micro_batch_size, *parallel.dp_rank_and_size(mesh))
    loss, tokens = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in data.make_loader(source, batches, 0, device):
        if abandon():
            return None
        input_ids, targets, *positions = (tensor.to(device, non_blocking=True) for tensor in batch)
        with parallel.loss_context(mesh):
            loss += parallel.to_local(model(input_ids, targets, *positions))
        tokens += (targets != IGNORE_INDEX).sum()
    # TP peers have the same rows: what is added up is each one's share
    loss, tokens = parallel.sum_over_ranks(loss / mesh["tp"].size(), tokens / mesh["tp"].size()).tolist()
    # comparable between tokenizers: bits per token x tokens per byte of the held-out text
    bits_per_byte = loss / tokens / math.log(2) * rows.num_targets / rows.num_bytes
    return {"val_loss": loss / tokens, "val_bits_per_byte": bits_per_byte, "val_tokens": int(tokens)}


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def train(config: Config, device: torch.device, started: float = 0, owns_process: bool = False) -> Iterator[tuple]:
    """One run, as a generator: `for kind, item in train(config, device)` runs it, calling it alone does nothing.

    Yields, on all ranks and equally often, ("line", what is logged) and ("checkpoint", the path of a complete one). It
    works in the process group that is there, also outside the main thread, and never ends the process, unless
    `owns_process` lets it end a rank that hangs. What a user got wrong is raised as `ranks.UserError` on all ranks
    alike. Who may leave early wraps it in `contextlib.closing`. `started`: when the process did, by perf_counter; 0 is
    now.
    """
    ranks.check_group(config.train.deterministic)
    ranks.same_everywhere("the configuration", configs.to_toml(config), "copy it, and start as many ranks on each")
    mesh = parallel.build_mesh(config.parallel, device)
    tp, (dp_rank, dp_size) = config.parallel.tp, parallel.dp_rank_and_size(mesh)
    start_up = StartUp(started).done("imports and processes")
    with ExitStack() as stack:
        hold = stack.enter_context
        # What there is: the run directory with its newest intact checkpoint, and the data. Nothing is written yet
        run = hold(RunDirectory(config))
        start_up.done("checkpoint search")
        size, counts = config.train.global_batch_size, run.state.get("rows_of_files")
        corpus = hold(open_corpus(config.data, run.path, size, counts, run.needed_from, run.own_tokenizer))
        config = ranks.together(partial(configs.settle, config, corpus.vocabulary, corpus.num_rows))
        train, optim, steps = config.train, config.optim, config.train.steps
        start_up.done("data")
        if run.is_complete(config, corpus.fingerprint, corpus.tokenizer_json):
            return

        # The model: shapes, then slices, then memory, then values
        with torch.device("meta"):
            model = Llama(config.model)
        parallel.parallelize(model, mesh, config.parallel)
        model.to_empty(device=device)
        model.init_weights(train.seed, parallel.place_shard)
        optimizer = make_optimizer(model, optim)
        run.load(model, optimizer, parallel.place_shard)  # if there is what to load; from here on files are written
        start_up.done("model")
        micro_steps = size // (train.micro_batch_size * dp_size)
        say(summary(parameter_count(config.model), config, mesh, device, micro_steps, corpus.source))

        # What the loop holds, and lets go of however it ends
        wandb_id, flat = run.state.get("wandb_id"), configs.flatten(config)
        with ranks.signals_held():  # which wandb and loader workers are not to see
            monitor = hold(ranks.together(partial(Monitor, config.run, run.step, steps, wandb_id, flat)))
        shutdown = hold(Shutdown(mesh, config.parallel.timeout_seconds, owns_process, monitor.waits))
        saver = hold(checkpoint.Saver(run.path, config.checkpoint, run.state.get("save_seconds", 0.0)))
        order = (corpus.source, run.step + 1, steps, size, train.micro_batch_size, train.seed, dp_rank, dp_size)
        batches = hold(data.batches(*order, config.data.num_workers, device, shutdown.meet, ranks.signals_held))
        tokens_seen = torch.tensor(run.state.get("tokens", 0), dtype=torch.float64, device=device)
        flops = size * config.data.seq_len * flops_per_token(config.model, config.data.seq_len) / dist.get_world_size()
        meter = Meter(flops, device, run.step, run.state, model.model.layers[0])
        skipped = SkippedSteps(train, corpus.source, data.rows_of_step, monitor, saver.wait)
        done, evaluated = kept = run.step, run.step - run.state.get("unevaluated", False)

        while True:
            # So many steps are done: look at what they have left, keep it, and do one more
            last, own = done == steps, done > run.step  # own: taken here, not read from a checkpoint
            evaluate_now = bool(corpus.validation) and done > 0 and due(done, train.eval_every, steps)
            if evaluate_now and done > evaluated:
                yield from skipped.report()
                with meter.paused():
                    result = evaluate(model, mesh, train, corpus.validation, partial(shutdown.agreed, own, last))
                if result is not None:
                    evaluated = done
                    yield monitor.log({"step": done, **result})
            stop, saved = shutdown.vote(monitor.problems + saver.problems(), saver.writing(), own, last, meter.pace())
            yield from saver.completed() if saved else ()
            shutdown.check_time(meter.step_seconds, saver.seconds)
            if (stop and (done, evaluated) != kept) or (own and due(done, config.checkpoint.every, steps)):
                yield from skipped.report()
                ranks.together(monitor.check)  # a line that could not be written must not lie behind a checkpoint
                state = {"tokens": int(tokens_seen.item()), "unevaluated": evaluate_now and done > evaluated}
                state |= {"rows_of_files": [*corpus.source.counts], "wandb_id": monitor.wandb_id} | meter.state
                with meter.paused(), shutdown.unwatched():
                    told = saver.save(done, model, optimizer, run.record(done, stop, **state))
                yield from told
            if stop or last:
                break

            ranks.collect_garbage(done - run.step, owns_process)
            loss, tokens = torch.zeros(2, dtype=torch.float64, device=device)
            try:
                for is_last, (input_ids, targets, *positions) in meter.loading(batches, micro_steps):  # (B, T) each
                    parallel.sum_over_replicas(model, config.parallel, is_last)
                    with parallel.loss_context(mesh):
                        micro_loss = model(input_ids, targets, *positions)  # a sum over tokens: micro-steps add up
                        micro_loss.backward()
                    loss += parallel.to_local(micro_loss.detach())
                    tokens += (targets != IGNORE_INDEX).sum()
            except Stopped:  # while all ranks waited for a file; so many steps are done as before
                continue
            done += 1

            # One division by the token count of the whole global batch (law 1), and clipping, in one pass over all.
            # TP peers have the same rows: what they add up is each one's share of loss and tokens
            square = parallel.gradient_square(model)
            loss, tokens, square = parallel.sum_over_ranks(loss / tp, tokens / tp, square)
            grad_norm = square.sqrt() / tokens
            clip = (optim.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if optim.grad_clip > 0 else 1.0
            parallel.scale_gradients(model, clip / tokens)
            lr = learning_rate(done, steps, optim)
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_ratio", 1.0)
            finite = loss.isfinite() & grad_norm.isfinite()  # the same on all ranks
            optimizer.found_inf = (~finite).float()  # told so, the fused kernel leaves weights and moments as they are
            optimizer.step()
            optimizer.zero_grad()
            skipped.record(done, ~finite)
            tokens_seen += tokens
            monitor.trace(done)
            if not own:
                say(start_up.done("first step").summary())
            if due(done, train.log_every, steps):
                yield from skipped.report()
                # .tolist() waits for the device
                mean_loss, norm, total = torch.stack((loss / tokens, grad_norm, tokens_seen)).tolist()
                speed = meter.line(done, int(total)) | shutdown.slowest()
                yield monitor.log({"step": done, "loss": mean_loss, "grad_norm": norm, "lr": lr, **speed})

        shutdown.rest()
        yield from saver.completed()
    run.say_how_it_ended(done, stop, shutdown.failure)


@record  # torchrun then shows the traceback of the rank that failed first
def main() -> None:
    """Exit status 0 when the run is complete or was stopped on request, 2 when the user's input is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the first step there is nothing to save, so no traceback
    if {"-h", "--help"} & set(sys.argv):
        return configs.print_help()
    try:
        ranks.check_launcher()
        config = configs.load(sys.argv[1:])
        device = ranks.init_distributed(config.train.deterministic)
        for _ in train(config, device, STARTED, owns_process=True):
            pass
    except (ranks.UserError, ranks.PeerFailed) as error:
        ranks.end_process(error)
    return ranks.leave_together()


if __name__ == "__main__":
    main()
