"""What the plan does to each module of a configuration, and what a step of it costs one rank.

    python explain.py [CONFIG.toml] [--section.key=value ...] [--world-size=8] [--local-world-size=8]
    python explain.py ... --full                                          all of it, and how to read it
    python explain.py ... --picture=FILE.png                              drawn on one page (or .svg)
    python explain.py ... --gpu=h100 [--node-link-gbps=400] [--json]      and what a step takes on such GPUs
    python explain.py ... --gpu=h100 --choose [--json]                    and which mesh is the fastest that fits

The arguments are train.py's; without CONFIG it is configs/quickstart.toml. --world-size is the number of ranks (8),
--local-world-size that of one node (all; with --gpu 8). It needs no GPU, no data and no other process. --choose sets
mesh, micro-batch, checkpointing and resharding itself.
--gpu is a row of cost/hardware.toml; how good its predictions are, `python benchmarks/published.py` prints.

Nothing here is a second copy of the plan. The real model, with one block of each kind, goes through
`parallel.parallelize` on a mesh of which this process is rank 0 and the others are pretended; then forward and backward
run on tensors that have a shape but no memory, and every collective that is called is written down. What a block does
is multiplied by the blocks of its kind.

In short:

  MODULE   one block stands for all of its kind. What Llama and Block send is FSDP's, over dp_shard
           (all-reduces: over dp_replicate); what the others send is TP's, over tp
  here     on rank 0. S(d): dim d is cut over tp; R: the same on all tp ranks
  --full   prints each size and count, and how to read them; --picture=FILE.png draws them

How to read it:

  Llama, Block  the whole model, and one of its blocks. With (FSDP): gathering parameters, summing
                gradients. Without: the loss, and the update's one sum of loss, tokens and norm.
                Where blocks differ, each kind is shown by its first block, under that one's number.
  placements    of a weight on dp_replicate, dp_shard and tp: S(d) = cut along dim d, R = the same
                on all ranks, P = a sum still pending, - = none. All but "whole" is rank 0's shape.
  arrives, computes on, leaves
                a module's input before and after the plan redistributes it, and its output after,
                each with its layout over tp
  recompute     what activation checkpointing runs once more in backward
  bytes         of a collective: the whole tensor as one rank sees it, which is what an all-gather
                returns, what a reduce-scatter is given, what an all-reduce sums
  a step        all calls, of all blocks and micro-steps; a group of one rank sends nothing
  memory        of parameters on rank 0, and no rank has more. What FSDP gathers comes on top: one
                block and the rest at once, all blocks without reshard_after_forward. While a block
                computes, the next one may be on its way.
  step, peak    with --gpu. Exposed: what compute waits for. Rest: what the host takes to launch
                kernels, beyond what they take. The peak is the allocator's at a step's worst
                moment; activations: what backward will need; at work: what lives only meanwhile
"""

import contextlib
import json
from argparse import SUPPRESS, ArgumentParser
from argparse import RawDescriptionHelpFormatter as Raw

import configs
import train
from configs import Config
from cost import hardware, text
from cost.choose import choose
from cost.predict import predict
from cost.record import explain
from runtime.ranks import UserError

IN_SHORT, _, HOW_TO_READ = __doc__.partition("In short:\n\n")[2].partition("\nHow to read it:\n\n")


def load(arguments: list[str], world: int, local_world: int, on_gpus: bool = False) -> Config:
    """The checked configuration for `world` ranks, `local_world` on each node, whatever there is here.

    UserError names what is wrong.
    """
    if min(world, local_world) < 1 or world % local_world:
        given = f"--world-size={world} with --local-world-size={local_world}"
        raise UserError(f"{given}: both must be positive integers, and the first a multiple of the second")
    config = configs.load(arguments, world, local_world, on_gpus)
    if config.model.vocab_size == 0 and config.data.tokenizer != "train":
        waits = f"model.vocab_size=0 waits for the tokenizer {config.data.tokenizer}, which is not loaded here"
        raise UserError(f"{waits}: give the number of rows with --model.vocab_size=N")
    return config if config.model.vocab_size else configs.settle(config, config.data.tokenizer_vocab_size, None)


def any_mesh(arguments: list[str], world: int, local_world: int, on_gpus: bool) -> Config:
    """The configuration with a mesh and a micro-batch that are allowed, whatever it says of them: for --choose.

    UserError is that of its own.
    """
    for tp in configs.divisors(max(1, local_world)):
        with contextlib.suppress(UserError):
            own = ["--parallel.dp_replicate=1", "--train.micro_batch_size=1", f"--parallel.tp={tp}"]
            return load([*arguments, *own], world, local_world, on_gpus)
    return load(arguments, world, local_world, on_gpus)


def main() -> None:
    """Exit status 2, with one message on standard error, where the input is wrong or --choose finds nothing."""
    parser = ArgumentParser(description=__doc__, usage=SUPPRESS, formatter_class=Raw, allow_abbrev=False)
    parser.add_argument("--world-size", type=int, default=8, help="number of ranks")
    parser.add_argument("--local-world-size", type=int, help="ranks of one node; by default all, or 8 with --gpu")
    parser.add_argument("--full", action="store_true", help="each size and count, and how to read them")
    parser.add_argument("--picture", metavar="FILE", help="draw the report, as .png or .svg")
    parser.add_argument("--gpu", help="predict the step time and the memory on such GPUs: see cost/hardware.toml")
    parser.add_argument("--node-link-gbps", type=float, help="of each GPU to other nodes, in Gb/s; else the table's")
    parser.add_argument("--choose", action="store_true", help="try every mesh, micro-batch and checkpointing")
    parser.add_argument("--json", action="store_true", help="print the prediction, or the choices, as one JSON object")
    options, arguments = parser.parse_known_args()
    world, local_world = options.world_size, options.local_world_size
    if local_world is None:
        local_world = world if options.gpu is None else min(world, 8)
    try:
        if options.gpu is None and (options.choose or options.json or options.node_link_gbps is not None):
            raise UserError("--choose, --json and --node-link-gbps go with --gpu=NAME: see cost/hardware.toml")
        if options.node_link_gbps is not None and not options.node_link_gbps > 0:
            raise UserError(f"--node-link-gbps={options.node_link_gbps:g}: must be above 0")
        gpu = None if options.gpu is None else hardware.named(options.gpu, options.node_link_gbps)
        if options.choose and (options.full or options.picture):
            raise UserError("--full and --picture show one configuration: paste a line of --choose before them")
        config = (any_mesh if options.choose else load)(arguments, world, local_world, gpu is not None)
        if gpu and options.choose:
            best, faster = choose(config, world, local_world, gpu, train.make_optimizer)
            found = {"choices": [each.as_json() for each in best], "faster": faster and faster.as_json()}
            print(json.dumps(found) if options.json else text.choices_text(best, faster))
            return
        report = explain(config, world, train.make_optimizer, gpu.memory_gib if gpu else 0)
        if options.picture:
            from docs.report import draw  # which needs matplotlib

            draw(report, options.picture)
    except UserError as error:
        parser.error(str(error))
    made = predict(report, gpu, local_world) if gpu else None
    if made and options.json:
        print(json.dumps(made.as_json()))
    else:
        print(text.render(report, HOW_TO_READ if options.full else IN_SHORT, options.full), end="")
        print("\n" + text.prediction_text(made, world) if made else "", end="")


if __name__ == "__main__":
    main()
