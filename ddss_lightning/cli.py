"""`ddss`: LightningCLI over YAML recipes (fit, validate, test, predict), and commands for saved samplers."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import re
import signal
import sys
import warnings
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import ArgumentError, auto_cli
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ddss_lightning import __version__
from ddss_lightning.callbacks import ImageWriter, Interruption, SampleQuality, SamplerPictures
from ddss_lightning.callbacks.folder import remove_start, run_folder
from ddss_lightning.callbacks.progress import EpochProgressBar
from ddss_lightning.commands import COMMANDS
from ddss_lightning.compare import Comparison, compare, parse
from ddss_lightning.data import ImageDataModule
from ddss_lightning.denoisers import Denoiser
from ddss_lightning.denoisers.base import check_complete
from ddss_lightning.features import FeatureExtractor
from ddss_lightning.files import why_no_folder
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.losses import SampleLoss
from ddss_lightning.module import DDSSModule
from ddss_lightning.saved import CARD_NAME, saved_sampler
from ddss_lightning.schedule import NoiseSchedule
from ddss_lightning.suggestions import suggestion

SUBCOMMANDS = ("fit", "validate", "test", "predict", "compare", *COMMANDS)
PARTS = ("denoiser", "sampler", "features", "loss", "model", "data", "trainer", "quality", "pictures", "images")
# After Ctrl+C.
GO_ON = {
    "fit": "--ckpt_path goes on from the last checkpoint, if there is one yet, and the same command starts again",
    "compare": "the same command goes on with what is missing",
    "predict": "the same command starts again with --images.overwrite=true",
}
# What Lightning resolves in `ckpt_path`, such as `registry:model`.
KEYWORDS = ("last", "best", "hpc", "registry")
# Errors that say what was wrong; of any other, such as the KeyError of a network of one's own, the kind says most.
EXPLAINED = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    NotImplementedError,
    ArithmeticError,
    ArgumentError,
    MisconfigurationException,
)
# Indices of noise need no worker processes, frozen networks are in evaluation mode on purpose, a short epoch is normal.
EXPECTED = (
    ".*does not have many workers.*",
    r".*module\(s\) in eval mode.*",
    ".*is smaller than the logging interval.*",
    ".*LightningCLI's args parameter.*",
    ".*local_dir_use_symlinks.*",
    ".*treespec, LeafSpec.*",
    ".*all_gather.* is deprecated.*",
)


def _schedule(denoiser: Denoiser) -> NoiseSchedule:
    check_complete(denoiser)
    return denoiser.schedule


def _prediction_type(denoiser: Denoiser) -> str:
    check_complete(denoiser)
    return denoiser.prediction_type


class SaveConfig(SaveConfigCallback):
    """Keeps the recipe of a run beside its logs; of a run that goes on, from a checkpoint in its folder, the last.

    That one is written when the checkpoint has been accepted. The recipe of another run is never overwritten. A run
    without a logger has no folder of its own, and its recipe is not kept.
    """

    # What this run wrote, before it began.
    written: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        # Lightning's log folder is shared by the runs of most loggers.
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the recipe, unless a checkpoint might be refused.

        Raises:
            ValueError: the folder holds another run.
        """
        if not trainer.loggers:
            return
        # All processes stop, or none.
        if held := trainer.strategy.broadcast(self._held(trainer, stage)):
            raise ValueError(held)
        folder = run_folder(trainer)
        if not self.overwrite or stage != "fit":
            self._write(trainer, pl_module, stage)
            self.written = folder / self.config_filename if trainer.is_global_zero else None

    def refuse_early(self, trainer: Trainer, stage: str) -> None:
        """As `setup`, before loggers are touched: that of CSV deletes the rows of the run that is there.

        Raises:
            ValueError: the folder holds another run, or cannot be made.
        """
        # Of processes that others have started, none may leave alone.
        alone = trainer.world_size == 1 or (trainer.strategy.launcher is not None and trainer.is_global_zero)
        logger = trainer.logger
        if alone and isinstance(logger, (CSVLogger, TensorBoardLogger)):
            if problem := why_no_folder(logger.save_dir):
                raise ValueError(f"--trainer.logger.save_dir: {problem}.")
            if held := self._held(trainer, stage):
                raise ValueError(held)

    def _held(self, trainer: Trainer, stage: str) -> str:
        """What to say if the folder holds another run."""
        checkpoint, folder = self.config.get("ckpt_path"), run_folder(trainer)
        if checkpoint:
            self.overwrite |= folder.resolve() in Path(checkpoint).resolve().parents
        if self.overwrite or not (folder / self.config_filename).exists():
            return ""
        go_on = "go on with it by --ckpt_path=last, or " if stage == "fit" else ""
        return f"'{folder}' holds a run; {go_on}give another --trainer.logger.version."

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the recipe of a run that goes on."""
        if trainer.loggers:
            self._write(trainer, pl_module, "fit")

    def _write(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Without the checkpoint that the run went on from, with which another command would start, too."""
        checkpoint, self.config["ckpt_path"] = self.config.get("ckpt_path"), None
        self.folder = run_folder(trainer)
        super().setup(trainer, pl_module, stage)
        self.config["ckpt_path"] = checkpoint

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Write the file; on the first process alone."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / self.config_filename
        self.parser.save(self.config, str(path), skip_none=False, overwrite=self.overwrite, multifile=self.multifile)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """A fit that fails before its first score had nothing to lose: its name is free again."""
        scored = any(each.initial for each in trainer.callbacks if isinstance(each, SampleQuality))  # type: ignore[attr-defined]
        if trainer.state.fn != "fit" or trainer.global_step or scored or not trainer.is_global_zero:
            return
        if self.written is not None:
            self.written.unlink(missing_ok=True)
        remove_start(trainer)


# Arguments of a sampler that fits every model.
STAND_IN = {
    "anchor": "dpmpp_2m",
    "eta": 0.0,
    "stride": "logsnr",
    "timesteps": None,
    "learn": [],
    "parametrization": "anchored",
}


class DDSSCommandLine(LightningCLI):
    """A recipe names a `denoiser`, a `sampler`, `features`, `loss`, `model` (how to learn), `data` and `trainer`.

    `denoiser`, `sampler`, `features` and `loss` are `class_path` and `init_args`; the class path can be a class or a
    method that makes one, such as `ddss_lightning.DiffusersDenoiser.from_pretrained`. `loss` is `KIDLoss` by default,
    and then takes `kernel` and `real` directly. The sampler gets the schedule and the
    prediction type of the denoiser. The callbacks `quality`, `pictures` and `images` are always there, and
    `interruption` unless `trainer.enable_checkpointing` is false.
    """

    @property
    def quality(self) -> SampleQuality:
        """The callback that scores and keeps the best sampler."""
        return next(each for each in self.trainer.callbacks if isinstance(each, SampleQuality))  # type: ignore[attr-defined]

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:  # noqa: ANN401
        """As Lightning's; of an unknown option, with the one that was probably meant.

        Raises:
            ValueError: arguments that the parser refuses.
        """
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            parsers = [parser, *getattr(self, "_subcommand_parsers", {}).values()]
            options = {flag[2:] for each in parsers for flag in each._option_string_actions if flag.startswith("--")}
            if len(parsers) == 1:  # of `ddss compare`, which has taken its own flags already
                options |= {field.name for field in dataclasses.fields(Comparison)}
            message = _one_line(error)
            raise ValueError(f"{message}{suggestion(message, sorted(options))}") from error

    def setup_parser(self, add_subcommands: bool, *options: Any) -> None:  # noqa: ANN401
        """As Lightning's; but without a subcommand, too, the `config.yaml` of a run is a recipe."""
        super().setup_parser(add_subcommands, *options)
        if not add_subcommands:
            self.parser.add_argument("--ckpt_path", type=str | None, help="of the run that wrote the recipe; not read")
            self.parser.add_argument("--weights_only", type=bool | None, help="likewise")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The parts of a recipe besides Lightning's own, and what links them."""
        parser.add_subclass_arguments(Denoiser, "denoiser", required=True, help="the frozen, pretrained model")
        parser.add_subclass_arguments(GGDMSampler, "sampler", required=True, help="the sampler to learn or use")
        parser.add_subclass_arguments(FeatureExtractor, "features", required=True, help="where images are compared")
        parser.add_subclass_arguments(SampleLoss, "loss", required=False, help="what is minimised; default: the KID")
        parser.set_defaults({"loss": {"class_path": "ddss_lightning.KIDLoss"}})
        # Without a logger: not among the models in a checkout's `checkpoints/`.
        parser.set_defaults({"trainer.default_root_dir": "runs"})
        parser.add_lightning_class_args(SampleQuality, "quality")
        parser.add_lightning_class_args(SamplerPictures, "pictures")
        parser.add_lightning_class_args(ImageWriter, "images")
        parser.add_lightning_class_args(Interruption, "interruption")
        parser.link_arguments("denoiser", "sampler.init_args.schedule", compute_fn=_schedule, apply_on="instantiate")
        parser.link_arguments(
            "denoiser", "sampler.init_args.prediction_type", compute_fn=_prediction_type, apply_on="instantiate"
        )
        for part in ("denoiser", "sampler", "features", "loss"):
            parser.link_arguments(part, f"model.{part}", apply_on="instantiate")
        parser.add_argument(
            "--pretrained_sampler",
            type=str | None,
            help="a saved sampler, used instead of the recipe's: a folder, or a hub name",
        )

    def before_instantiate_classes(self) -> None:
        """`seed_everything` is the seed of learning too, unless `model.seed` is given."""
        seed, model = self._get(self.config, "seed_everything"), self._get(self.config, "model")
        if type(seed) is int and hasattr(model, "get") and model.get("seed") is None:
            model["seed"] = seed
        elif type(seed) is int and seed and hasattr(model, "get") and model.get("seed") != seed:
            rank_zero_info(f"noise of seed {model.get('seed')} (model.seed), not of {seed} (seed_everything)")

    def instantiate_classes(self) -> None:
        """Make the recipe's objects; a saved sampler takes the place of the recipe's.

        Raises:
            ValueError: a checkpoint or a saved sampler that cannot be meant.
        """
        folder = self._get(self.config, "pretrained_sampler")
        checkpoint: Any = self._get(self.config, "ckpt_path") if self.subcommand else None
        if checkpoint == "last" and self.subcommand not in (None, "fit"):
            raise ValueError(
                f"--ckpt_path=last is for fit; give {self.subcommand} the path of a checkpoint, or the folder of a "
                "sampler: --pretrained_sampler."
            )
        if checkpoint and Path(checkpoint).is_dir():
            raise ValueError(
                f"--ckpt_path: '{checkpoint}' is a folder; give a file, such as its checkpoints/last.ckpt."
            )
        # A fit that began with a saved sampler needs both: the one says what is learned, the other where it was.
        if folder and checkpoint and self.subcommand != "fit":
            raise ValueError("Give --pretrained_sampler or --ckpt_path, not both: each brings a sampler.")
        local = checkpoint and checkpoint.partition(":")[0] not in KEYWORDS and "://" not in checkpoint
        if local and not Path(checkpoint).exists():
            raise ValueError(f"--ckpt_path: there is no file '{checkpoint}', seen from '{Path.cwd()}'.")
        if local:
            _check_readable(checkpoint)
        sampler = self._get(self.config, "sampler")
        if folder and self.subcommand not in (None, "fit") and hasattr(sampler, "init_args"):
            # The recipe's need not fit the model: a stand-in, which fits all, is made until the saved one is loaded.
            for name, value in STAND_IN.items():
                sampler.init_args[name] = value
        super().instantiate_classes()
        if checkpoint == "last":
            self._go_on()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfig):
                callback.refuse_early(self.trainer, str(self.subcommand))
        if folder:
            learn = self.model.sampler.config["learn"] if self.subcommand == "fit" else ()
            self.model.load_sampler(saved_sampler(folder), learn)
            learned = ", ".join(self.model.sampler.config["learn"]) or "nothing"
            rank_zero_info(
                f"sampler: the one in '{folder}', {self.model.sampler.num_steps} network calls, instead of the recipe's"
                + f"; what is learned of it: {learned}" * (self.subcommand == "fit")
            )
        elif self.subcommand in ("validate", "test", "predict") and not checkpoint:
            # The configuration of a run is beside what it learned.
            beside = [Path(str(each)).parent for each in self._get(self.config, "config") or []]
            learned = next((f"'{each}'" for each in beside if (each / "sampler" / CARD_NAME).is_file()), "FOLDER")
            rank_zero_info(f"sampler: the recipe's, nothing learned; for a learned one --pretrained_sampler={learned}")

    def _go_on(self) -> None:
        """The same command starts a fit and goes on with it: from the checkpoint in its folder, where there is one.

        Raises:
            ValueError: a logger that makes a new folder for each run.
        """
        named = self._get(self.config, "interruption").dirpath
        if not named and _makes_new_folders(self._get(self.config, "trainer").logger):
            raise ValueError(
                "--ckpt_path=last goes on in the folder of a run, and without a name each run has a new one; give a "
                "name: --trainer.logger.version=NAME."
            )
        # Where Lightning will look for it.
        keepers = [each for each in self.trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        found = [path for keeper in keepers for path in keeper._find_last_checkpoints(self.trainer)]
        if found:
            for path in found:
                _check_readable(path)
        else:
            # A run that ended before its first checkpoint, if any, has nothing to lose but its start.
            rank_zero_info("there is no checkpoint in the folder of the run yet: a new fit")
            self.config_init[self.subcommand]["ckpt_path"] = None
            self.quality.overwrite_start = True
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfig):
                callback.overwrite = True

    def before_predict(self) -> None:
        """Images go to files; in memory they would be kept until the end."""
        if self.config_init["predict"]["return_predictions"] is None:
            self.config_init["predict"]["return_predictions"] = False

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        given = config.get("callbacks") or []
        every = [*callbacks, *(given if isinstance(given, list) else [given])]
        wanted = config.get("enable_progress_bar") is not False and not config.get("barebones")
        if wanted and not any(isinstance(each, ProgressBar) for each in every):
            callbacks = [*callbacks, EpochProgressBar()]
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Interruption)]
        return super()._instantiate_trainer(config, callbacks)

    def _parse_ckpt_path(self) -> None:
        """Flags and recipe win over the hyperparameters of a checkpoint, which Lightning would let override them."""


def _check_readable(checkpoint: str) -> None:
    """Find a damaged checkpoint before long work starts, and say so better than `torch.load`.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zipfile, torch: each its own
        raise ValueError(
            f"--ckpt_path: '{checkpoint}' is no checkpoint of a fit, or a damaged one; give another, or start from a "
            "saved sampler: --pretrained_sampler."
        ) from error


def _makes_new_folders(logger: Any) -> bool:  # noqa: ANN401 - what a recipe may give
    """Whether a logger, as it was configured, logs each run in another folder."""
    if isinstance(logger, list):
        return bool(logger) and _makes_new_folders(logger[0])
    options = logger.get("init_args", {}) if hasattr(logger, "get") else {}
    return logger in (None, True) or ("version" in options and options["version"] is None)


def _check_given(args: list[str]) -> None:
    """Make sure that there is a recipe, or a model: the parser would name the first of many parts that it lacks.

    Raises:
        ValueError: neither.
    """
    enough = ("-c", "--config", "--denoiser", "-h", "--help", "--version")
    if args[0] in SUBCOMMANDS and not any(arg.startswith(enough) for arg in args[1:]):
        raise ValueError(f"`ddss {args[0]}` needs a recipe: -c FILE, such as recipes/digits_5.yaml.")


def _check_recipes(args: list[str]) -> None:
    """Find files that are no recipes, which the parser would not name.

    Raises:
        ValueError: one that is no YAML, or not of parts with names.
    """
    files = [file for flag, file in itertools.pairwise(args) if flag in ("-c", "--config")]
    for file in [*files, *(arg.partition("=")[2] for arg in args if arg.startswith("--config="))]:
        try:
            content = yaml.safe_load(Path(file).read_text())
        except OSError:  # what the parser tells, or a recipe that is given as it is
            continue
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise ValueError(f"'{file}' is no recipe: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"'{file}' is no recipe: a recipe has parts, such as `denoiser:` and `trainer:`.")
        wrong = [name for name in PARTS if not isinstance(content.get(name, {}), (dict, str, NoneType))]
        if wrong:
            raise ValueError(f"'{file}': `{wrong[0]}` must have named values below it, got {content[wrong[0]]!r}.")


def _one_line(error: Exception) -> str:
    """The message without line breaks; of the parser's nested report on a wrong value only the innermost part."""
    # Of a link between parts the parser names all arguments, such as a whole network.
    message = re.sub(r".*Call to compute_fn of link .* failed: ", "", " ".join(str(error).split()))
    key, _, report = message.rpartition('Parser key "')[2].partition('": ')
    # A part of the recipe: its class is not there, or does not take these arguments.
    problem = re.search(r"Errors: - (?:Problem with given class_path )?(.*?) - Expected a <class 'NoneType'>", report)
    value = re.search(r"(?:Got|Given) value: (\S+)", report)
    if problem and value and problem[1].startswith("Expected a dot import path string"):
        return f"{key}: expected a class by its import path, or values by name (--{key}.NAME=...), got {value[1]}."
    if problem and value and problem[1].endswith("Sequence'>"):
        return f"{key}: expected a list, such as [{value[1]}], got {value[1]}."
    if problem and not re.search("(Given|Got) value", problem[1]):
        return f"{key}: {problem[1]}"
    expected = re.search(r"Expected an? (?:typing\.)?(.*?)(?:\. Got value| - Expected| Given value)", report)
    if 'Parser key "' not in message or not expected or not value:
        ours = re.search(r"Union subtypes .* Errors: - (.*?) - Expected a <class 'NoneType'>", message)
        return ours[1] if ours else message
    # An anchor.
    by_class = "; a scheduler of diffusers is named by class_path" * ("- Expected a <class 'dict'>" in report)
    return f"{key}: expected {expected[1].replace('Literal', 'one of ')}, got {value[1]}{by_class}."


def command_line(args: list[str] | None = None, run: bool = True) -> DDSSCommandLine:
    """Run `ddss` from Python and return its objects: `.model`, `.datamodule`, `.trainer`.

    Args:
        args: as on the command line; default `sys.argv`.
        run: with False, `args` has no subcommand and the objects of the recipe are only made.
    """
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message=message)
    return DDSSCommandLine(
        DDSSModule,
        ImageDataModule,
        subclass_mode_data=True,
        # Objects that are only made leave no file behind when they are used.
        save_config_callback=SaveConfig if run else None,
        seed_everything_default=0,
        parser_kwargs={
            "exit_on_error": False,
            "version": __version__,
            "description": "Learn and use fast samplers. Besides the subcommands below: `ddss compare` scores "
            "samplers, `ddss export` writes one for diffusers, `ddss inspect` shows what it is; all take --help.",
        },
        args=args,
        run=run,
    )


def _run_command(name: str, args: list[str]) -> None:
    """Run one of `COMMANDS`.

    Raises:
        ArgumentError: a wrong value.
        ValueError: of the command; or other arguments than it has, with the way it is called.
    """
    command = COMMANDS[name]
    parameters = inspect.signature(command).parameters
    options = [each for each, of in parameters.items() if of.default is not of.empty]
    usage = " ".join(each.upper() for each in parameters if each not in options)
    try:
        auto_cli(command, args=args, prog=f"ddss {name}", exit_on_error=False)
    except ArgumentError as error:
        # A wrong value speaks for itself.
        if "Parser key" in str(error):
            raise
        meant = suggestion(str(error), options)
        raise ValueError(f"{error}{meant or f'; it is `ddss {name} {usage}`, see --help.'}") from error


def main(args: list[str] | None = None) -> None:
    """Console entry point.

    Bad input ends with one line on standard error and exit status 1, Ctrl+C with 130, SIGTERM with 143.
    """
    args = sys.argv[1:] if args is None else args
    try:
        if not args or not (args[0] in SUBCOMMANDS or args[0].startswith("-")):
            asked = f"There is no subcommand '{args[0]}'" if args else "A subcommand is needed"
            raise ValueError(f"{asked}; choose one of {', '.join(SUBCOMMANDS)}, and see its --help.")
        _check_recipes(args)
        if args[0] in COMMANDS:
            _run_command(args[0], args[1:])
        elif args[0] == "compare":
            recipes, settings, others = parse(args[1:])
            cli = command_line([*(f"--config={recipe}" for recipe in recipes), *others], run=False)
            if settings.judge is None:
                settings = dataclasses.replace(settings, judge=cli.quality.judge)
            compare(cli.model, cli.datamodule, cli.trainer, settings)
        else:
            _check_given(args)
            command_line(args)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read has seen enough, as in `ddss inspect DIR | head`; what is left would be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning makes status 1, that of bad input, of Ctrl+C, and none of SIGTERM while it validates or tests.
        told = isinstance(error, SIGTERMException) and error.code is None
        if isinstance(error, SystemExit) and not told and not isinstance(error.__context__, KeyboardInterrupt):
            raise
        if told and getattr(rank_zero_only, "rank", False):
            # One process speaks for all: its launcher kills the main process when another one ends with an error.
            raise SystemExit(0) from None
        print(f"ddss: interrupted; {GO_ON.get(args[0], 'the same command starts again')}", file=sys.stderr)
        raise SystemExit(128 + (signal.SIGTERM if told else signal.SIGINT)) from None
    except Exception as error:
        if os.environ.get("DDSS_TRACEBACK"):
            raise
        kind = "" if isinstance(error, EXPLAINED) else f"{type(error).__name__}: "
        print(f"ddss: error: {kind}{_one_line(error)} (DDSS_TRACEBACK=1 shows where)", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
