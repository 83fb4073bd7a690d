"""Training speed next to what people would use instead, in one run: `make bench`.

The rounds go round robin, so that what else the machine does hits all contenders alike (contenders.py says what each of
them does). The table shows how many times as fast as the other ours is: the median over the rounds of the ratio within
a round, and the extremes. The result is appended to benchmarks/results/bench.jsonl with the machine's description.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.contenders import Contender, Job, matmul, ours, plain, transformers, tutorial
from model import ModelConfig
from runtime.hardware import slow_bfloat16

SEQ_LEN, BATCH = 256, 16
DTYPES = ["bfloat16", "float32"]
SLOW_BFLOAT16 = (
    "param_dtype = bfloat16 on a CPU without bf16 instructions is 50 times slower than float32 (seen: 0.9 against "
    "58 GFLOP/s in matrix products)"
)
SHAPE = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=SEQ_LEN,
)
FUNCTIONS = {"ours": ours, "tutorial": tutorial, "transformers": transformers, "plain": plain, "matmul": matmul}
RATIOS = [  # ours, the other, the goals of the dtypes that it is measured in
    ("ours compiled", "tutorial", {"bfloat16": 1.5, "float32": 1.3}),
    ("ours compiled tp2", "tutorial tp2", {"bfloat16": 1.4}),
    ("ours compiled dp2", "tutorial dp2", {"bfloat16": 1.4}),
    ("ours compiled", "transformers", {"bfloat16": 1.25, "float32": 1.25}),
    ("ours compiled", "transformers compiled", {"bfloat16": 1.05, "float32": 1.05}),
    ("ours compiled", "plain compiled", {"bfloat16": 0.97, "float32": 0.97}),
    ("ours", "plain", {"bfloat16": 0.97, "float32": 0.97}),
    ("ours compiled", "matmul", {"bfloat16": 0.55, "float32": None}),
]


def start(name: str, dtype: str, folder: Path) -> Contender:
    """`name` is a function and how it runs, as in "ours compiled tp2"."""
    function, *how = name.split()
    ranks = 2 if {"tp2", "dp2"} & set(how) else 1
    tp, micro_batch = (2 if "tp2" in how else 1), (BATCH // 2 if "dp2" in how else BATCH)
    job = Job(SHAPE, SEQ_LEN, BATCH, micro_batch, dtype, ranks, tp, "compiled" in how)
    return Contender(FUNCTIONS[function], job, folder / dtype / name)


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each contender")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of one measurement")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: all that this CPU computes at speed")
    parser.add_argument("--only", default="", help="of the ratios, those that have this in a name")
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout
    result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit.strip(), "machine": machine()}
    result |= {"rounds": arguments.rounds, "steps": arguments.steps, "ratios": []}
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    print(f"{arguments.rounds} rounds of {arguments.steps} steps; times as fast as the other, median [least, most]")
    left_out = arguments.dtypes is None and slow_bfloat16(torch.device("cpu"))
    if left_out:
        print(f"bfloat16 is left out: {SLOW_BFLOAT16}")
    for dtype in arguments.dtypes or (["float32"] if left_out else DTYPES):
        chosen = [
            (left, right, goals[dtype])
            for left, right, goals in RATIOS
            if dtype in goals and (arguments.only in left or arguments.only in right)
        ]
        with tempfile.TemporaryDirectory() as folder:
            names = dict.fromkeys(name for left, right, _ in chosen for name in (left, right))
            contenders = {name: start(name, dtype, Path(folder)) for name in names}
            seconds = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name, contender in contenders.items():
                    seconds[name].append(contender.seconds(arguments.steps))
            for contender in contenders.values():
                contender.stop()
        print(f"\n{dtype:20} {'against':22} {'ratio':>6}   {'spread':14} {'goal':>4}")
        for left, right, goal in chosen:
            ratios = [other / own for own, other in zip(seconds[left], seconds[right], strict=True)]
            ratio, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(f"{left:20} {right:22} {ratio:6.2f}   [{low:.2f}, {high:.2f}]   {goal or '':>4}")
            row = {
                "dtype": dtype,
                "ours": left,
                "other": right,
                "ratio": ratio,
                "least": low,
                "most": high,
                "goal": goal,
            }
            result["ratios"].append(row)
        result[f"seconds_{dtype}"] = {name: statistics.median(values) for name, values in seconds.items()}
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    with (folder / "bench.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
