"""Training speed on one GPU next to what people would use instead: `python benchmarks/gpu.py`.

llama3_1b's shape in bf16, compiled: tokens a second, MFU against the datasheet's dense bf16 peak and against the rate
of large matrix products measured in the same run, and peak memory. The contenders (contenders.py) fill the GPU, so they
take turns instead of rounds; ours goes first and last, and the two should agree.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import configs
from benchmarks.contenders import Contender, Job, PaceWithMemory, matmul, ours, plain, transformers
from runtime.monitor import peak_flops

TURNS = {  # contender, compiled
    "ours": (ours, True),
    "ours, eager": (ours, False),
    "transformers": (transformers, True),
    "transformers, eager": (transformers, False),
    "plain, nanoGPT's way": (plain, True),
    "matmul": (matmul, False),
    "ours again": (ours, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/llama3_1b.toml", help="whose model is trained")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=2, help="rows at a time")
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--steps", type=int, default=10, help="measured, after a warm-up")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: needs a CUDA device; benchmarks/bench.py is the comparison for CPUs")
    shape = configs.load([arguments.config, "--parallel.tp=1"]).model
    shape.max_position_embeddings = arguments.seq_len
    gpu = torch.cuda.get_device_name()
    peak = peak_flops(torch.device("cuda"))
    print(
        f"{gpu}, torch {torch.__version__}; {Path(arguments.config).stem}, bfloat16, {arguments.seq_len} tokens a row,"
    )
    print(f"{arguments.batch} rows a step in micro-steps of {arguments.micro_batch}; mean of {arguments.steps} steps\n")
    answers = {}
    for name, (contender, compiled) in TURNS.items():
        sizes = (arguments.seq_len, arguments.batch, arguments.micro_batch)
        job = Job(shape, *sizes, "bfloat16", compiled=compiled)
        with tempfile.TemporaryDirectory() as folder:
            try:
                process = Contender(contender, job, Path(folder) / name, PaceWithMemory)
                (answers[name],) = process.ask(arguments.steps)
                process.stop()
            except RuntimeError as error:  # out of memory, most likely
                print(f"{error}\n")
    print("| | tokens/s | MFU | of the matmul rate | peak GiB | ours is |\n|" + " --- |" * 6)
    for name, (seconds, memory) in answers.items():
        mfu = f"{job.flops() / seconds / peak:.1%}" if peak else "unknown"
        speed, share = arguments.batch * arguments.seq_len / seconds, answers["matmul"][0] / seconds
        times = seconds / answers["ours"][0]
        print(f"| {name} | {speed:,.0f} | {mfu} | {share:.1%} | {memory:.1f} | {times:.2f} x |")


if __name__ == "__main__":
    main()
