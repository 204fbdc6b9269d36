"""`python -m dsmoe COMMAND`: what the machine offers, which recipes there are, what a run has saved, what
a model costs and where it fits, which implementation of an operation is fastest here.

Training starts from launchers/.
"""

import argparse
import sys
from collections.abc import Sequence

from dsmoe import __version__
from dsmoe.base.errors import EXIT_BAD_INPUT, UserError
from dsmoe.convert.options import add_arguments as add_convert_options
from dsmoe.scaling.options import add_arguments as add_plan_options
from dsmoe.scaling.tune_options import add_arguments as add_tune_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit code 0, or 2 with one line on stderr for a user's mistake."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dsmoe",
        description="What this machine offers, which recipes there are, what a run has saved, what a model costs and "
        "where it fits, which implementation is fastest here. Training starts from launchers/.",
    )
    parser.add_argument("--version", action="version", version=f"dsmoe {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="print what was found here and which implementation each op uses")
    doctor.add_argument("--no-measure", action="store_true", help="leave out the timing of a matrix product")
    doctor.add_argument("--deepspeed_config", metavar="FILE", help="show the ops as a run with this file uses them")
    doctor.add_argument(
        "--ds_report", action="store_true", help="then DeepSpeed's own report, with our operations in it"
    )
    doctor.set_defaults(run=_doctor)
    recipes = commands.add_parser("recipes", help="list the recipes that --recipe accepts by name")
    recipes.set_defaults(run=_recipes)
    saved = commands.add_parser("checkpoints", help="list, verify, prune or export the checkpoints of a run folder")
    saved.add_argument("folder", metavar="RUN")
    action = saved.add_mutually_exclusive_group()
    action.add_argument("--verify", action="store_true", help="read every byte and name what is damaged")
    action.add_argument("--prune", type=int, metavar="N", help="delete all older than the newest N whole ones")
    action.add_argument("--export", metavar="FILE", help="write the newest whole one's weights to FILE.safetensors")
    saved.add_argument("--kind", default="ema", help="weights to export: model, or an average's name (default ema)")
    saved.add_argument("--at", type=int, metavar="IMAGES", help="export that checkpoint instead, by images seen")
    saved.set_defaults(run=_checkpoints)
    routing = commands.add_parser("routing", help="draw and sum up where a run's routers send its images")
    routing.add_argument("folder", metavar="RUN")
    routing.add_argument("--out", metavar="FILE.png", help="default RUN/routing.png")
    routing.set_defaults(run=_routing)
    macs = commands.add_parser("macs", help="parameters and multiply-accumulates of a model, by arithmetic and counted")
    macs.add_argument("name", metavar="PRESET|RECIPE", help="a name or a .yaml file; all: every preset, as markdown")
    macs.add_argument("--resolution", type=int, metavar="PX", help="image side (default the recipe's, or 256)")
    macs.add_argument("--classes", type=int, metavar="N", help="number of classes (default the recipe's, or 1000)")
    macs.set_defaults(run=_macs)
    plan = commands.add_parser("plan", help="lay a model out over a cluster: memory, traffic, a ranked recommendation")
    add_plan_options(plan)
    plan.set_defaults(run=_plan)
    tune = commands.add_parser("tune", help="measure each op's implementations here; dispatch reads what it writes")
    add_tune_options(tune)
    tune.set_defaults(run=_tune)
    convert = commands.add_parser("convert", help="weights of DiT, SiT, DiT-MoE, diffusers, DeepSpeed, ours: both ways")
    add_convert_options(convert)
    convert.set_defaults(run=_convert)
    return parser


def _doctor(arguments: argparse.Namespace) -> int:
    # Imported here, as in every command, so that --help needs no torch.
    from dsmoe import ops
    from dsmoe.ds_config import load_policy
    from dsmoe.ops import tuning
    from dsmoe.runtime.device import Device
    from dsmoe.runtime.doctor import report

    if arguments.deepspeed_config:
        ops.prefer(load_policy(arguments.deepspeed_config).block.ops, Device.pick().kind)
    found = [("dsmoe", __version__), *report(ops.implementations, ops.kernels(), not arguments.no_measure)]
    try:
        found += [("tuning", line) for line in tuning.describe(Device.pick().name)]
    finally:  # a damaged tuning file must not keep the rest back
        _print_table(found)
    if arguments.ds_report:
        from dsmoe.training import ds_report

        print(flush=True)
        ds_report.show()
    return 0


def _recipes(_: argparse.Namespace) -> int:
    from dsmoe.base.recipe import list_recipes

    _print_table(list_recipes())
    return 0


def _checkpoints(arguments: argparse.Namespace) -> int:
    from dsmoe.checkpoint import command

    store = command.open_store(arguments.folder)
    if arguments.export:
        print(command.export(store, arguments.export, arguments.kind, arguments.at))
    elif arguments.prune is not None:
        gone = command.prune(store, arguments.prune)
        print(f"deleted {', '.join(gone)}" if gone else "nothing to delete")
    else:
        for name, facts in command.listing(store, arguments.verify):
            print(f"{name}  {facts}")
    return 0


def _routing(arguments: argparse.Namespace) -> int:
    from dsmoe.evaluation import routing

    print(routing.report(arguments.folder, arguments.out))
    return 0


def _macs(arguments: argparse.Namespace) -> int:
    from dsmoe.scaling import macs

    sizes = arguments.resolution, arguments.classes
    print(macs.table(*sizes) if arguments.name == macs.ALL else macs.report(macs.sized_model(arguments.name, *sizes)))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from dsmoe.scaling import report

    print(report.run(arguments))
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from dsmoe.scaling import tune

    return tune.run(arguments)


def _convert(arguments: argparse.Namespace) -> int:
    from dsmoe.convert import command

    _print_table(command.run(arguments))
    return 0


def _print_table(rows: Sequence[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in rows), default=0)
    for name, text in rows:
        print(f"{name:<{width}}  {text}")


if __name__ == "__main__":
    sys.exit(main())
