"""Which mesh, micro-batch and checkpointing: everything that is allowed is predicted, and the fastest come first."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import configs
from configs import Config
from cost.hardware import Hardware
from cost.predict import Prediction, predict
from cost.record import explain
from runtime.ranks import UserError

Kept = Literal["none", "selective", "full"]
CHECKPOINTING: tuple[Kept, ...] = ("none", "selective", "full")
KEYS = ["parallel.tp", "parallel.dp_replicate", "train.micro_batch_size", "parallel.activation_checkpointing"]
KEYS = [*KEYS, "parallel.reshard_after_forward"]


@dataclass
class Choice:
    """One configuration: the values of KEYS, and what it costs."""

    key: tuple[int, int, int, str, bool]
    prediction: Prediction

    def rank(self) -> tuple[bool, float, float]:
        """What fits comes first: what is faster by a percent, then what takes less memory. This orders others too."""
        made = self.prediction
        return not made.fits, round(math.log(made.step_seconds), 2) if made.fits else 0.0, made.memory_gib

    def arguments(self) -> str:
        """To be pasted behind train.py or explain.py."""
        return " ".join(f"--{name}={str(x).lower()}" for name, x in zip(KEYS, self.key, strict=True))

    def as_json(self) -> dict[str, Any]:
        return dict(zip(KEYS, self.key, strict=True)) | {"arguments": self.arguments()} | self.prediction.as_json()


def with_values(config: Config, tp: int, micro_batch: int, kept: Kept) -> Config:
    plan = replace(config.parallel, tp=tp, dp_replicate=1, activation_checkpointing=kept, reshard_after_forward=True)
    return replace(config, parallel=plan, train=replace(config.train, micro_batch_size=micro_batch))


def candidates(
    config: Config, world: int, local_world: int, hardware: Hardware, make_optimizer: Callable
) -> Iterator[Choice]:
    """For each tp, micro-batch and checkpointing the best way to shard; without those that another one is sure to beat.

    Where a checkpointing fits, one that recomputes more is only slower; where it does not, it does not with more rows
    either; and once more rows bring less than 1 %, still more of them only take memory.
    """
    for tp in configs.divisors(local_world):
        dp, batch, kinds, best = world // tp, config.train.global_batch_size, list(CHECKPOINTING), math.inf
        if configs.mesh_errors(with_values(config, tp, 1, "none"), tp, world) or batch % dp:
            continue
        for micro_batch in configs.divisors(batch // dp):
            before, fits = best, False
            while kinds and not fits:
                asked = with_values(config, tp, micro_batch, kinds[0])
                report = explain(asked, world, make_optimizer, hardware.memory_gib, quick=True)
                made = []
                for replicas, reshard in itertools.product(configs.divisors(dp), (True, False)):
                    plan = replace(asked.parallel, dp_replicate=replicas, reshard_after_forward=reshard)
                    key = tp, replicas, micro_batch, kinds[0], reshard
                    made.append(Choice(key, predict(report, hardware, local_world, plan)))
                chosen = min(made, key=Choice.rank)
                fits = chosen.prediction.fits
                yield chosen
                if fits:
                    best = min(best, chosen.prediction.step_seconds)
                else:
                    del kinds[0]
            if not kinds or best > 0.99 * before:
                break


def choose(
    config: Config, world: int, local_world: int, hardware: Hardware, make_optimizer: Callable
) -> tuple[list[Choice], Choice | None]:
    """The ten fastest that fit, in order, and the fastest of all if it does not fit. UserError if none fits."""
    found = list(candidates(config, world, local_world, hardware, make_optimizer))
    found.sort(key=Choice.rank)
    fitting = [choice for choice in found if choice.prediction.fits]
    if not fitting:
        least = min(found, key=lambda choice: choice.prediction.memory_gib, default=None)
        need = f"the least is {least.prediction.memory_gib:.1f} GiB with {least.arguments()}" if least else "no mesh is"
        raise UserError(f"nothing fits {world} x {hardware.name}: {need}; more GPUs, or larger ones")
    fastest = min(found, key=lambda choice: choice.prediction.step_seconds)
    return fitting[:10], None if fastest.prediction.fits else fastest
