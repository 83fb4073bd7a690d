"""Pretrain a Llama with tensor parallelism x FSDP2.

    python train.py                                                        one process: a CPU, or one GPU
    torchrun --standalone --nproc_per_node=4 train.py --parallel.tp=2      2 x 2 mesh on one node
    torchrun --nproc_per_node=8 train.py configs/llama3_8b.toml            8 GPUs; two nodes: see README.md

Arguments: [CONFIG.toml] [--section.key=value ...]; `--help` lists every key. Running the same command again resumes.
"""

import gc
import hashlib
import math
import os
import signal
import sys
import time

STARTED = time.perf_counter()  # before the slow imports

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.elastic.multiprocessing.errors import record

import checkpoint
import configs
import data
import parallel
import stream
from configs import Config, OptimConfig
from model import IGNORE_INDEX, Llama, parameter_count
from monitor import Meter, Monitor, StartUp, check_wandb, make_tracer, say
from shutdown import Shutdown, signals_held


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Of optimizer step `step`, counted from 1: linear warm-up, then cosine to min_lr_ratio * lr at the last step."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    floor = optim.min_lr_ratio * optim.lr
    return floor + (optim.lr - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: Llama, optim: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only, not on norms."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def choose_checkpoint(candidates: list[Path]) -> tuple[Path | None, list[Path]]:
    """The first of the candidates, the newest, that is intact, and the damaged ones before it. All ranks read along."""
    with parallel.errors_stop_all_ranks():
        if not all(path.is_dir() for path in candidates):
            raise ValueError("run.dir is not the same directory on all nodes: use a shared file system")
    damaged = []
    for path in candidates:
        found = parallel.gather(checkpoint.damage(path, dist.get_rank(), dist.get_world_size()))
        found = list(dict.fromkeys(line for lines in found for line in lines))
        if not found:
            return path, damaged
        damaged.append(path)
        say("WARNING: a damaged checkpoint, trying the one before it:\n  " + "\n  ".join(found))
    with parallel.errors_stop_all_ranks():
        if damaged:
            raise ValueError(f"no checkpoint is intact, {damaged[-1]} was the last: start over in another --run.dir")
    return None, damaged


def prepare_data(config: Config, run_dir: Path) -> tuple[str, data.Corpus]:
    """The tokenizer as JSON, from rank 0; and the corpus, tokenised by the first rank of each node."""
    rank, tokenizer_json, prepared = dist.get_rank(), None, None
    with parallel.errors_stop_all_ranks():
        if rank == 0:
            recorded = run_dir / "tokenizer.json"  # trained before for this very run
            reuse = config.data.tokenizer == "train" and recorded.exists()
            source = replace(config.data, tokenizer=str(recorded)) if reuse else config.data
            tokenizer_json = data.load_tokenizer(source).to_str()
    tokenizer_json = parallel.from_rank_0(tokenizer_json)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    with parallel.errors_stop_all_ranks():
        if parallel.local_rank() == 0:
            if config.data.streaming:
                prepared = stream.prepare(config.data, tokenizer, run_dir)
            else:
                prepared = data.tokenize_all(config.data, tokenizer, show_progress=rank == 0)
    prepared = parallel.gather(prepared)[rank - parallel.local_rank()]
    with parallel.errors_stop_all_ranks():
        load_corpus = stream.load_corpus if config.data.streaming else data.load_corpus
        corpus = load_corpus(config.data, tokenizer, *prepared)
    fingerprints = parallel.gather(corpus.fingerprint)
    with parallel.errors_stop_all_ranks():
        if len(set(fingerprints)) > 1:
            raise ValueError(f"data.dataset={config.data.dataset} is not the same on all nodes: copy it from one")
        num_rows = None if config.data.streaming else len(corpus.train)
        resolve_with_data(config, data.vocabulary_size(tokenizer), num_rows)
    return tokenizer_json, corpus


def resolve_with_data(config: Config, vocabulary: int, num_rows: int | None) -> None:
    """Settle vocab_size and steps, and check what could not be checked before. Raises ValueError.

    `num_rows` is None when streaming: then train.steps is given.
    """
    model, train = config.model, config.train
    enough = math.ceil(vocabulary / 128) * 128
    model.vocab_size = model.vocab_size or enough
    if vocabulary > model.vocab_size:
        raise ValueError(
            f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocabulary} tokens: "
            f"raise it to {enough}, or set it to 0 (the tokenizer's)"
        )
    if num_rows is None:
        return
    steps_per_epoch = num_rows // train.global_batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"data.dataset={config.data.dataset} has {num_rows} training rows, fewer than "
            f"train.global_batch_size={train.global_batch_size}: lower it or add documents"
        )
    train.steps = train.steps or train.epochs * steps_per_epoch
    if config.optim.warmup_steps > train.steps:
        raise ValueError(configs.warmup_error(config.optim.warmup_steps, train.steps))


def micro_batches(
    config: Config, rows: data.Rows | stream.StreamRows, mesh: DeviceMesh, first_step: int, dealt: dict[int, Tensor]
) -> Iterator[list[int]]:
    """Row numbers of this rank's micro-batches, from first_step to the end of the run; `dealt` gets those of each step.

    The loader asks for them ahead of time.
    """
    train, steps = config.train, range(first_step, config.train.steps + 1)
    global_batches = rows.global_batches(first_step, train.global_batch_size, train.seed)
    try:
        for step, batch in zip(steps, global_batches, strict=False):
            dealt[step] = batch
            yield from data.deal(batch, train.micro_batch_size, *parallel.dp_rank_and_size(mesh))
    except ValueError as error:  # a file that cannot be read, which every rank waits for
        parallel.stop_all_ranks(str(error))


@torch.no_grad()
def evaluate(
    model: Llama,
    mesh: DeviceMesh,
    config: Config,
    rows: data.Rows,
    device: torch.device,
    abandon: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Mean loss per token over the held-out rows, each once, on any mesh; None if all ranks agree to abandon it."""
    order = data.epoch_order(len(rows), seed=0, epoch=0)
    order = order[: config.train.eval_batches * config.train.global_batch_size or None]
    batches = data.deal(order, config.train.micro_batch_size, *parallel.dp_rank_and_size(mesh))
    loss, tokens = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in data.make_loader(rows, batches, 0, device):
        if abandon():
            return None
        input_ids, targets, *positions = (tensor.to(device, non_blocking=True) for tensor in batch)
        with parallel.loss_context(mesh):
            loss += parallel.to_local(model(input_ids, targets, *positions))
        tokens += (targets != IGNORE_INDEX).sum()
    tp = mesh["tp"].size()  # TP peers have the same rows
    loss, tokens = parallel.sum_over_ranks(loss / tp, tokens / tp).tolist()
    # comparable between tokenizers: bits per token x tokens per byte of the held-out text
    bits_per_byte = loss / tokens / math.log(2) * rows.num_targets / rows.num_bytes
    return {"val_loss": loss / tokens, "val_bits_per_byte": bits_per_byte, "val_tokens": int(tokens)}


class SkippedSteps:
    """Which steps the optimizer has skipped because their loss or gradient was not finite."""

    def __init__(self):
        self.unread, self.in_a_row, self.most_in_a_row = [], 0, 0

    def record(self, step: int, rows: Tensor, flag: Tensor) -> None:
        """The flag stays on the device."""
        self.unread.append((step, rows, flag))

    def read(self) -> list[tuple[int, Tensor]]:
        """The skipped steps since the last call with their rows. Waits for the device; all ranks get the same."""
        skipped = []
        for step, rows, flag in self.unread:
            self.in_a_row = self.in_a_row + 1 if flag else 0
            self.most_in_a_row = max(self.most_in_a_row, self.in_a_row)
            skipped += [(step, rows)] if flag else []
        self.unread.clear()
        return skipped


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def train(config: Config, device: torch.device) -> None:
    """Everything between the configuration and the end of the process group."""
    model_config, optim, train, run_dir = config.model, config.optim, config.train, Path(config.run.dir)
    is_main = dist.get_rank() == 0
    start_up = StartUp(STARTED).done("imports and processes")

    # What the run directory holds, then the data: whatever is wrong with them is found before anything is written.
    configurations = parallel.gather(configs.to_toml(config))
    with parallel.errors_stop_all_ranks():
        if len(set(configurations)) > 1:
            raise ValueError("the configuration is not the same on all nodes: copy it, and start as many ranks on each")
    mesh = parallel.build_mesh(config.parallel, device)
    identity, candidates, lock, state = checkpoint.identity(configs.flatten(config)), [], None, {}
    with parallel.errors_stop_all_ranks():
        if is_main:
            check_wandb(config)
            checkpoint.check_writable(run_dir)
            candidates = checkpoint.find_resume(run_dir, config.checkpoint.resume)
    candidates = parallel.from_rank_0(candidates)
    resume_from, damaged = choose_checkpoint(candidates)
    with parallel.errors_stop_all_ranks():
        if is_main:
            checkpoint.refuse_another_run(resume_from, run_dir, identity)
    start_up.done("checkpoint search")
    tokenizer_json, corpus = prepare_data(config, run_dir)
    start_up.done("data")
    digests = {"tokenizer": hashlib.sha256(tokenizer_json.encode()).hexdigest()[:32], "data": corpus.fingerprint}
    identity = checkpoint.identity(configs.flatten(config)) | digests
    with parallel.errors_stop_all_ranks():
        if is_main:
            checkpoint.refuse_another_run(resume_from, run_dir, identity)
            state = checkpoint.read_state(resume_from) if resume_from else {}
            if resume_from and run_dir not in resume_from.parents:  # a branch is a run of its own
                state |= {"wandb_id": None, "branched_from": config.checkpoint.resume}
    state = parallel.from_rank_0(state)
    first_step = state.get("step", 0) + 1
    if first_step > train.steps:
        say(
            f"complete at step {first_step - 1}, {resume_from}: go on with --train.steps=N (N > {first_step - 1}), "
            "or start over with another --run.dir"
        )
        return
    with parallel.errors_stop_all_ranks():
        if is_main:
            lock = checkpoint.lock(run_dir)
            if checkpoint.find_resume(run_dir, config.checkpoint.resume) != candidates:
                raise ValueError(f"run.dir={run_dir} was still being written by another job: start again")
            own = [path for path in damaged if run_dir in path.parents]  # nothing is done to what we branch off
            checkpoint.prepare_run(
                run_dir, configs.to_toml(config), tokenizer_json, first_step, own, state.get("unevaluated", False)
            )
    with parallel.errors_stop_all_ranks():  # each rank writes its own slices of a checkpoint into it
        if not (run_dir / "checkpoints").is_dir():
            raise ValueError(f"run.dir={run_dir} is not the same directory on all nodes: use a shared file system")

    # The model: shapes, then slices, then memory, then values.
    with torch.device("meta"):
        model = Llama(model_config)
    parallel.parallelize(model, mesh, config.parallel)
    model.to_empty(device=device)
    model.init_weights(train.seed, parallel.place_shard)
    optimizer = make_optimizer(model, optim)
    if resume_from:
        checkpoint.load(resume_from, model, optimizer)
        say(f"resumed from {resume_from}")
        if state["total_steps"] != train.steps:
            say(f"{train.steps} steps now instead of {state['total_steps']}: the cosine is another one from here on")

    start_up.done("model")
    tp, (_, dp_size) = config.parallel.tp, parallel.dp_rank_and_size(mesh)
    micro_steps = train.global_batch_size // (train.micro_batch_size * dp_size)
    say(
        f"Llama with {parameter_count(model_config):,} parameters, {config.parallel.param_dtype}, on {device.type}; "
        f"mesh {' x '.join(f'{name} {mesh[name].size()}' for name in mesh.mesh_dim_names)}\n"
        f"{corpus.train} of {config.data.seq_len} tokens; a step takes {train.global_batch_size}, "
        f"in {micro_steps} micro-steps of {train.micro_batch_size} on {dp_size} data-parallel ranks"
    )
    shutdown = Shutdown(mesh, config.parallel.timeout_seconds)
    saver = checkpoint.Saver(run_dir, config.checkpoint)
    dealt: dict[int, Tensor] = {}  # rows of the steps that the loader works on
    batches = micro_batches(config, corpus.train, mesh, first_step, dealt)
    with signals_held():
        corpus.train.start(state.get("rows_of_files"), leads_node=parallel.local_rank() == 0)
        batches = iter(data.make_loader(corpus.train, batches, config.data.num_workers, device))
        monitor = Monitor(config, first_step, state.get("wandb_id"))
    trace = make_tracer(config, first_step)
    trace(first_step - 1)
    tokens_seen = torch.tensor(state.get("tokens", 0), dtype=torch.float64, device=device)
    meter, skipped = Meter(config, device, first_step - 1, state.get("tokens", 0)), SkippedSteps()

    def report_skipped() -> None:
        for step, rows in skipped.read():
            monitor.log({"step": step, "skipped_rows": corpus.train.names(rows)})
        if skipped.most_in_a_row > train.max_skipped_steps:
            with parallel.errors_stop_all_ranks():
                saver.wait()
                raise ValueError(
                    f"{skipped.most_in_a_row} steps in a row had no finite loss or gradient, more than "
                    f"train.max_skipped_steps={train.max_skipped_steps}: lower optim.lr or look at the rows named above"
                )

    def validate(step: int) -> bool:
        """False when it was abandoned: all ranks were asked to stop."""
        with meter.paused():
            abandon = lambda: shutdown.agreed(watch=step >= first_step) and step < train.steps  # noqa: E731
            result = evaluate(model, mesh, config, corpus.validation, device, abandon)
        if result is not None:
            monitor.log({"step": step, **result})
        return result is not None

    step, stopping = first_step - 1, False
    if state.get("unevaluated"):  # the run was stopped before it came to that
        stopping = not validate(step)

    for step in range(first_step, train.steps + 1) if not stopping else ():
        loss, tokens = torch.zeros(2, dtype=torch.float64, device=device)
        for _ in range(micro_steps):
            with meter.loading():
                # (B, T) each, positions only with data.document_mask
                input_ids, targets, *positions = (tensor.to(device, non_blocking=True) for tensor in next(batches))
            with parallel.loss_context(mesh):
                micro_loss = model(input_ids, targets, *positions)  # a sum over tokens: micro-steps add up
                micro_loss.backward()
            loss += parallel.to_local(micro_loss.detach())
            tokens += (targets != IGNORE_INDEX).sum()

        # One division by the token count of the whole global batch, and clipping, in one pass over the gradients
        square = parallel.gradient_square(model)
        loss, tokens, square = parallel.sum_over_ranks(loss / tp, tokens / tp, square)  # TP peers have the same rows
        grad_norm = square.sqrt() / tokens
        clip = (optim.grad_clip / (grad_norm + 1e-6)).clamp(max=1.0) if optim.grad_clip > 0 else 1.0
        parallel.scale_gradients(model, clip / tokens)
        lr = learning_rate(step, train.steps, optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        finite = loss.isfinite() & grad_norm.isfinite()  # the same on all ranks
        optimizer.found_inf = (~finite).float()  # told so, the fused kernel leaves weights and moments as they are
        optimizer.step()
        optimizer.zero_grad()
        skipped.record(step, dealt.pop(step), ~finite)
        tokens_seen += tokens
        trace(step)
        if step == first_step:
            say(start_up.done("first step").summary())

        if due(step, train.log_every, train.steps):
            report_skipped()
            # .tolist() waits for the device
            mean_loss, norm, total = torch.stack((loss / tokens, grad_norm, tokens_seen)).tolist()
            speed = meter.line(step, int(total))
            monitor.log({"step": step, "loss": mean_loss, "grad_norm": norm, "lr": lr, **speed})
        if saver.failed():  # in the background: the next save would tell, but that may be hours away
            monitor.problems.append(saver.pending.exception())
        stopping = shutdown.agreed(monitor.problems) and step < train.steps
        unevaluated = False
        if corpus.validation and due(step, train.eval_every, train.steps):
            unevaluated = stopping or not validate(step)
        stopping |= unevaluated
        if due(step, config.checkpoint.every, train.steps) or stopping:
            report_skipped()
            shutdown.agreed(monitor.problems)  # a line that could not be written must not lie behind a checkpoint
            status = "stopped" if stopping else "complete" if step == train.steps else "saved"
            with meter.paused(), parallel.errors_stop_all_ranks():
                shutdown.unwatch()
                state |= {"tokens": int(tokens_seen.item()), "total_steps": train.steps, "identity": identity}
                state |= {"status": f"{status} at step {step}", "unevaluated": unevaluated}
                state["rows_of_files"] = corpus.train.counts
                state["wandb_id"] = monitor.wandb.id if monitor.wandb else state.get("wandb_id")
                saver.save(step, model, optimizer, state)
                corpus.train.forget(checkpoint.oldest_step(run_dir))
            shutdown.watch()
        if stopping:
            break

    shutdown.unwatch()
    with parallel.errors_stop_all_ranks():
        saver.wait()
    monitor.close()
    if lock is not None:
        lock.close()
    newest = run_dir / "checkpoints" / f"step_{step:08d}" if step >= first_step else resume_from
    if stopping:
        say(f"the same command goes on from {newest}")
        say(f"stopped at step {step}")
        return
    say(f"complete at step {step}: checkpoint {newest}, metrics {run_dir}/metrics.jsonl")
    say(f'sample from it: python generate.py {run_dir} --prompt "def "')


@record  # torchrun then shows the traceback of the rank that failed first
def main() -> None:
    """Exit status 0 when the run is complete or was stopped on request, 2 when the user's input is wrong."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # before the first step there is nothing to save, so no traceback
    if {"-h", "--help"} & set(sys.argv):
        if int(os.environ.get("RANK", 0)) == 0:
            print(configs.help_text())
        return
    try:
        config = configs.load(sys.argv[1:])
    except configs.ConfigError as error:
        parallel.stop_all_ranks(str(error))
    if config.train.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    gc.freeze()  # what the imports have made is no garbage: without it the collector has little to walk through
    device = parallel.init_distributed()
    train(config, device)
    # gloo sometimes aborts a process that exits while tensors of the model are alive. `train` has dropped its
    # references, so collect the cycles, then leave together.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
