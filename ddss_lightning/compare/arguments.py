"""The arguments of `ddss compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from ddss_lightning.compare.settings import Comparison
from ddss_lightning.handmade import SOLVERS


class _Parser(argparse.ArgumentParser):
    """Without usage, and without an end of the process: a wrong value is an error like others."""

    def error(self, message: str) -> NoReturn:
        """Raise it.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{message}; see `ddss compare --help`.")


# Flags of the other commands that `ddss compare` has its own for.
NOT_HERE = {
    "--pretrained_sampler": "--samplers FOLDER",
    "--ckpt_path": "--samplers FOLDER, where FOLDER is the `sampler` in the folder of the run",
    "--data.num_test_images": "--num_images",
    "--data.init_args.num_test_images": "--num_images",
    "--data.num_val_images": "--selection_images",
    "--data.init_args.num_val_images": "--selection_images",
}


def parse(args: list[str]) -> tuple[list[str], Comparison, list[str]]:
    """The recipes of `ddss compare`, what is compared, and the other flags, which override the recipes.

    Raises:
        ValueError: a wrong value, no recipe, a flag that would have no effect; see `Comparison`, too.
    """
    parser = _Parser(
        prog="ddss compare",
        description="Score solvers and learned samplers of the model of a recipe on the same noise. Further flags, "
        "such as --trainer.devices=2 --trainer.strategy=ddp, override the recipe. Interrupted, it goes on where it "
        "stopped.",
        allow_abbrev=False,
    )
    default = Comparison()
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        required=True,
        help="a recipe: its denoiser, features, data and trainer; several lie on top of each other",
    )
    parser.add_argument("--steps", type=int, nargs="+", default=default.steps, help="numbers of network calls")
    parser.add_argument(
        "--solvers",
        nargs="*",
        default=default.solvers,
        help=f"of {', '.join(SOLVERS)}; or all; without a name learned samplers only",
        metavar="SOLVER",
    )
    parser.add_argument(
        "--samplers",
        nargs="*",
        default=default.samplers,
        help="folders (or hub names) of learned samplers; those of one label are one curve; {seed} stands for the seed "
        "of the noise",
        metavar="[LABEL=]FOLDER",
    )
    parser.add_argument(
        "--judge",
        help="folder of a second feature network, which scores the same images; default: the recipe's `quality.judge`",
        metavar="FOLDER",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=default.seeds, help="of the noise")
    parser.add_argument("--num_images", type=int, default=default.num_images)
    parser.add_argument(
        "--selection_images",
        type=int,
        default=default.selection_images,
        help="to choose the spacing of a solver's calls",
    )
    parser.add_argument("--output", type=Path, default=default.output)
    arguments, others = parser.parse_known_args(args)
    for flag in others:
        if flag.partition("=")[0] in NOT_HERE:
            name = flag.partition("=")[0]
            raise ValueError(f"`ddss compare` does not look at {name}; give {NOT_HERE[name]}.")
    given = vars(arguments)
    return given.pop("config"), Comparison(**given), others
