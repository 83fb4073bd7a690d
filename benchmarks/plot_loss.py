"""Draw a run's loss: `python benchmarks/plot_loss.py runs/quickstart assets/quickstart.png`."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    run_dir, picture = map(Path, sys.argv[1:3])
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for key, name, style in (("loss", "training, every step", "-"), ("val_loss", "validation", "o--")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points, strict=True), style, label=name, linewidth=1.2, markersize=5)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=f"{run_dir.name} on a 2 x 2 mesh")
    axes.grid(alpha=0.3)
    axes.legend()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
