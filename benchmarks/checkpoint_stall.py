"""How long training stands still for a checkpoint, synchronous against asynchronous, in one run.

    python benchmarks/checkpoint_stall.py                                                   one process
    torchrun --standalone --nproc_per_node=2 benchmarks/checkpoint_stall.py                 two

The rounds alternate. A round is ROUND_STEPS steps of a 21-million-parameter Llama with a save before the first of them;
"stall" is the time inside `save`, "round" the time of the whole round, in which the background write may slow the steps
down. Medians, with the smallest and the largest in brackets; the last line is what matters, a ratio.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))
import checkpoint
import parallel
from configs import OptimConfig
from model import Llama, ModelConfig
from runtime import ranks
from train import make_optimizer

ROUNDS, ROUND_STEPS = 5, 4
MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=256,
)


def main() -> None:
    device = ranks.init_distributed()
    config = parallel.ParallelConfig(tp=1)
    with torch.device("meta"):
        model = Llama(MODEL)
    parallel.parallelize(model, parallel.build_mesh(config, device), config)
    model.to_empty(device=device)
    model.init_weights(0, parallel.place_shard)
    optimizer = make_optimizer(model, OptimConfig())
    rows = torch.randint(0, MODEL.vocab_size, (4, 256), device=device)

    def step() -> None:
        model(rows, rows).backward()
        optimizer.step()
        optimizer.zero_grad()

    with tempfile.TemporaryDirectory() as folder:
        (run_dir := Path(ranks.broadcast(folder))).joinpath("checkpoints").mkdir(exist_ok=True)
        savers = {
            "sync": checkpoint.Saver(run_dir, checkpoint.CheckpointConfig(async_save=False)),
            "async": checkpoint.Saver(run_dir, checkpoint.CheckpointConfig(async_save=True)),
        }
        seconds = {(name, what): [] for what in ("stall", "round") for name in ("none", *savers)}
        step()
        for number in range(ROUNDS + 1):
            for index, name in enumerate(("none", *savers)):
                dist.barrier()
                start = time.perf_counter()
                if name in savers:
                    savers[name].save(3 * number + index, model, optimizer, {})
                stall = time.perf_counter() - start
                for _ in range(ROUND_STEPS):
                    step()
                whole = time.perf_counter() - start
                if name in savers:
                    savers[name].wait()
                if number > 0:  # the first is a warm-up
                    seconds[name, "stall"].append(stall)
                    seconds[name, "round"].append(whole)
        dist.barrier()
    if dist.get_rank() == 0:
        for (name, what), values in seconds.items():
            print(f"{what} {name:5}  {statistics.median(values):7.3f} s  [{min(values):.3f}, {max(values):.3f}]")
        medians = {key: statistics.median(values) for key, values in seconds.items()}
        lost = {name: medians[name, "round"] - medians["none", "round"] for name in savers}
        print(f"stall, async / sync: {medians['async', 'stall'] / medians['sync', 'stall']:.2f}")
        print(f"time lost, writing in the background included, async / sync: {lost['async'] / lost['sync']:.2f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
