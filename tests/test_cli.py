import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from PIL import Image

import ddss_lightning
from ddss_lightning.callbacks import ImageWriter, SampleQuality
from ddss_lightning.callbacks.progress import EpochProgressBar
from ddss_lightning.cli import command_line, main
from ddss_lightning.data import DigitsDataModule
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.module import DDSSModule
from ddss_lightning.sampling import SamplingModule
from ddss_lightning.saved import read_card
from tests.conftest import DDPM, ROOT

OWN = ROOT / "recipes" / "own_model.yaml"
RECIPES = sorted(set((ROOT / "recipes").glob("*.yaml")) - {OWN})
QUICK = ["--trainer.max_steps=2", "--data.steps_per_epoch=2", "--data.num_val_images=24", "--data.num_test_images=20"]
QUICK += ["--model.batch_size=8", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
RECIPE = str(ROOT / "recipes" / "digits_5.yaml")

pytestmark = pytest.mark.usefixtures("at_root")


def quick(command, tmp_path, *flags):
    return [command, "-c", RECIPE, *QUICK, f"--trainer.logger.save_dir={tmp_path}", *flags]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_runs(recipe, tmp_path):
    base = {"glyphs_10": "glyphs.yaml", "digits_teacher": "digits_5.yaml"}.get(recipe.stem)
    files = [recipe.with_name(base), recipe] if base else [recipe]
    text = "".join(file.read_text() for file in files)
    flags = ["--trainer.fast_dev_run=true", "--model.batch_size=4", "--data.eval_batch_size=8"]
    if "gauss_newton" in text:
        few = [f"--model.gauss_newton.{name}_images=8" for name in ("residual", "trial")]
        flags += [*few, "--sampler.learn=[time]"]
    if "teacher:" in text:
        flags += ["--model.teacher.num_pairs=8", "--model.teacher.num_steps=3", f"--model.teacher.cache_dir={tmp_path}"]
    if "Glyphs" in text:
        flags += ["--data.num_images=100", f"--data.cache_dir={tmp_path}"]
    main(["fit", *(f"-c={file}" for file in files), *flags, f"--trainer.logger.save_dir={tmp_path}"])


@pytest.mark.parametrize("size", [16, 32])
def test_the_recipe_for_one_s_own_model_with_its_lines_changed(tmp_path, capsys, size):
    """Model, folder and size, each in one line; Inception's weights are not here, and asked for before any work."""
    network = UNet2DModel(
        sample_size=size, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(network, DDPMScheduler()).save_pretrained(tmp_path / "model")
    (tmp_path / "real").mkdir()
    for index in range(9):
        pixels = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8, generator=torch.manual_seed(index))
        Image.fromarray(pixels.numpy()).save(tmp_path / "real" / f"{index}.png")
    text = OWN.read_text()
    changed = {"google/ddpm-cifar10-32": tmp_path / "model", "cifar10/train": tmp_path / "real"}
    changed |= {"&size 32": f"&size {size}", "weights: null": f"weights: {tmp_path / 'none.pth'}"}
    for old, new in changed.items():
        assert text.count(old) == 1
        text = text.replace(old, str(new))
    (tmp_path / "mine.yaml").write_text(text)
    flags = [f"-c={tmp_path / 'mine.yaml'}", *QUICK, f"--trainer.logger.save_dir={tmp_path}"]
    flags += ["--model.teacher.num_pairs=16", "--model.teacher.num_steps=3", f"--model.teacher.cache_dir={tmp_path}"]
    assert "No Inception weights at" in error_of(capsys, ["fit", *flags])
    main(["fit", *flags, "--features=ddss_lightning.RandomFeatures", f"--features.image_size={size}"])
    (sampler,) = (tmp_path / "own_model").rglob("sampler.json")
    assert GGDMSampler.from_pretrained(sampler.parent).num_steps == 10


@pytest.mark.parametrize("args", [["fitt", "-c", RECIPE], []])
def test_an_unknown_subcommand_is_told_all_of_them(args, capsys):
    error = error_of(capsys, args)
    assert ("There is no subcommand 'fitt'" if args else "A subcommand is needed") in error
    assert "choose one of fit, validate, test, predict, compare, export, inspect" in error


LOSSES = {
    "linear": ["--loss.kernel=linear", "--loss.real=batch"],
    "frechet": ["--loss=FrechetLoss", "--loss.decay=0.5"],
    "teacher_features": ["--loss=TeacherLoss", "--loss.distance=features"],
    "loss": ["--config={tmp_path}/sum.yaml", "--model.teacher.relax_radius=0.5", "--loss.weights.x=2.0"],
}
SUM = """
loss:
  class_path: ddss_lightning.WeightedSum
  init_args:
    losses:
      kid: {class_path: ddss_lightning.KIDLoss}
      x: {class_path: ddss_lightning.TeacherLoss, init_args: {distance: l2}}
    weights: {kid: 0.5, x: 1.0}
"""


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_by_the_command_line(tmp_path, name):
    (tmp_path / "sum.yaml").write_text(SUM)
    flags = [flag.format(tmp_path=tmp_path) for flag in LOSSES[name]]
    if name in ("teacher_features", "loss"):
        settings = {"num_pairs": 16, "num_steps": 3, "cache_dir": tmp_path}
        flags += [f"--model.teacher.{key}={value}" for key, value in settings.items()]
    cli = command_line(quick("fit", tmp_path, *flags, "--trainer.log_every_n_steps=1"))
    logged = {"linear": {"kid"}, "loss": {"loss", "kid", "x"}}.get(name, {name})
    assert {f"train/{each}" for each in logged} <= set(cli.trainer.logged_metrics)
    assert ("train/kid" in cli.trainer.logged_metrics) == ("kid" in logged)
    (saved,) = tmp_path.rglob("config.yaml")
    weights = yaml.safe_load(saved.read_text())["loss"]["init_args"].get("weights")
    assert weights == ({"kid": 0.5, "x": 2.0} if name == "loss" else None)


def test_without_a_logger_nothing_is_left_behind(tmp_path):
    """A second run found the recipe of the first in the working folder, and refused to go on."""
    flags = [*QUICK, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    for _ in range(2):
        main(["test", "-c", RECIPE, *flags])
    assert not list(tmp_path.iterdir())


class LoggerOfOneFolder(DummyLogger):
    """Tells all its runs the same `save_dir`, as that of Weights & Biases."""

    def __init__(self, save_dir: str, version: str) -> None:
        super().__init__()
        self.folder, self.run = save_dir, version

    name, save_dir, version = "project", property(lambda self: self.folder), property(lambda self: self.run)


def test_runs_of_any_logger_have_folders_of_their_own(tmp_path, capsys):
    """The second was refused, by the first one's recipe, and would have drawn over its pictures."""
    flags = [*QUICK, f"--trainer.logger={__name__}.LoggerOfOneFolder", f"--trainer.logger.save_dir={tmp_path}"]
    for version in ("a", "b"):
        main(["fit", "-c", RECIPE, *flags, f"--trainer.logger.version={version}"])
        here = {path.name for path in (tmp_path / "project" / version).iterdir()}
        assert here == {"config.yaml", "sampler", "pictures", "checkpoints"}
    assert {path.name for path in tmp_path.iterdir()} == {"project"}
    again = ["fit", "-c", RECIPE, *flags, "--trainer.logger.version=b"]
    assert "project/b' holds a run; go on with it by --ckpt_path=last" in error_of(capsys, again)
    main([*again, "--ckpt_path=last"])


def test_fit_resume_validate_test_predict(tmp_path, caplog):
    main(quick("fit", tmp_path))
    version = tmp_path / "digits_5" / "version_0"
    (checkpoint,) = (version / "checkpoints").glob("*.ckpt")
    assert checkpoint.stat().st_size < 100_000
    assert (version / "sampler" / "sampler.json").is_file()
    assert (version / "config.yaml").is_file()
    assert f"saved in '{version / 'sampler'}'" in caplog.text

    # Flags win over what the checkpoint remembers, and resuming goes on where it stopped.
    main(quick("fit", tmp_path, "--trainer.max_steps=4", "--model.lr=0.5", f"--ckpt_path={checkpoint}"))
    config = yaml.safe_load((tmp_path / "digits_5" / "version_1" / "config.yaml").read_text())
    assert config["model"]["lr"] == 0.5
    (resumed,) = (tmp_path / "digits_5" / "version_1" / "checkpoints").glob("*.ckpt")
    assert torch.load(resumed, weights_only=True)["global_step"] == 4

    main(quick("validate", tmp_path, f"--ckpt_path={checkpoint}", "--trainer.enable_checkpointing=false"))
    saved = f"--pretrained_sampler={version / 'sampler'}"
    assert "nothing learned" not in caplog.text
    main(quick("test", tmp_path))
    assert "sampler: the recipe's, nothing learned; for a learned one --pretrained_sampler=FOLDER" in caplog.text
    main(["validate", "-c", str(version / "config.yaml")])
    assert f"sampler: the recipe's, nothing learned; for a learned one --pretrained_sampler='{version}'" in caplog.text
    caplog.clear()
    main(quick("test", tmp_path, saved))
    assert "nothing learned" not in caplog.text
    main(quick("predict", tmp_path, saved, "--data.num_predict_images=5", f"--images.output_dir={tmp_path / 'out'}"))
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == [*(f"{i:05d}.png" for i in range(5)), "grid.png"]
    with Image.open(tmp_path / "out" / "00000.png") as image:
        assert (image.size, image.mode) == ((8, 8), "L")
    # Five images of 64 pixels in a row of at most eight: no place is left empty.
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (5 * 65, 65)


def test_the_config_of_a_run_is_a_recipe_for_every_command(tmp_path, capsys):
    """`ddss compare` refused it, and of a run that went on `ddss test` would have scored where that began."""
    main(quick("fit", tmp_path, "--sampler.num_steps=3"))
    last = tmp_path / "digits_5" / "version_0" / "checkpoints" / "last.ckpt"
    main(quick("fit", tmp_path, "--sampler.num_steps=3", "--trainer.max_steps=3", f"--ckpt_path={last}"))
    run = tmp_path / "digits_5" / "version_1"
    recipe = run / "config.yaml"
    assert yaml.safe_load(recipe.read_text())["ckpt_path"] is None
    assert command_line(["-c", str(recipe)], run=False).model.sampler.num_steps == 3
    flags = ["--num_images=8", "--selection_images=8", f"--output={tmp_path / 'out'}", "--trainer.logger=false"]
    main(["compare", "-c", str(recipe), "--steps", "3", "--solvers", "DDIM", "--samplers", f"ours={run}", *flags])
    assert "| 3 | ours |" in (tmp_path / "out" / "table.md").read_text()
    assert "give --samplers FOLDER, where FOLDER is" in error_of(
        capsys, ["compare", "-c", str(recipe), "--ckpt_path=x"]
    )


def test_print_config_round_trips(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", RECIPE, "--model.lr=0.25", "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    config = yaml.safe_load(printed)
    assert config["model"]["lr"] == 0.25
    assert config["sampler"]["init_args"]["num_steps"] == 5
    (tmp_path / "again.yaml").write_text(printed)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "-c", str(tmp_path / "again.yaml"), "--print_config"])
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out) == config


def error_of(capsys, arguments):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--denoiser.pretrained_path=no/such/model"],
            "No diffusion model in 'no/such/model': there is no such folder, ",
        ),
        (
            ["--features.pretrained_path=no/such/network"],
            f"such folder, seen from '{ROOT}'; a recipe's paths begin where",
        ),
        (["--sampler.num_steps=0"], "num_steps must be between 1 and the 1000 steps of the noise schedule, got 0"),
        (["--sampler.num_steps=1001"], "got 1001"),
        (
            [
                "--sampler.anchor={{class_path: UniPC, solver_order: 3}}",
                "--sampler.stride=linear",
                "--sampler.learn=[mu]",
            ],
            "On the command line an anchor is given whole: --sampler.anchor='{class_path: ..., init_args: {...}}'",
        ),
        (["--ckpt_path={tmp_path}"], "is a folder; give a file, such as its checkpoints/last.ckpt"),
        (["--ckpt_path=last"], "give a name: --trainer.logger.version=NAME"),
        (["--images.columns=0"], "images.columns must be at least 1, got 0"),
        (["--images.scale=0"], "images.scale must be at least 1, got 0"),
        (
            ["--data=ddss_lightning.ImageFolderDataModule", "--data.root={tmp_path}", "--data.image_size=0"],
            "image_size must be at least 1 pixel, got 0",
        ),
        (
            ["--sampler.anchor=heun"],
            "anchor: expected one of ['ddim', 'dpmpp_2m'], got heun; a scheduler of diffusers is named by class_p",
        ),
        (
            ["--model.gauss_newton=true"],
            "expected a class by its import path, or values by name (--model.gauss_newton.NAME=...), got True. (",
        ),
        (["--sampler.learn=[mu,sigma]"], "got sigma"),
        (["--sampler.learn=[mu,logsnr]", "--sampler.parametrization=ggdm"], "'logsnr' does not exist in the ggdm"),
        (["--loss.kernel=rbf"], "kernel: expected one of ['cubic', 'linear'], got rbf"),
        (["--loss=TeacherLoss"], "The loss needs target of a teacher"),
        (["--loss=TeacherLoss", "--loss.distance=l1"], "expected one of ['l2', 'features', 'lpips'], got l1"),
        (["--model.teacher.relax_radius=-1"], "relax_radius must be a number of at least 0, got -1"),
        (["--ckpt_path=no/such.ckpt"], "no/such.ckpt"),
        (["--pretrained_sampler=no/such", "--ckpt_path=no/such.ckpt"], "there is no file 'no/such.ckpt'"),
        (["--pretrained_sampler=no/such/sampler"], "There is no folder 'no/such/sampler'"),
        (["--model.batch_size=1"], "batch_size must be at least 2"),
        (
            ["--data=ddss_lightning.ImageFolderDataModule", "--data.root=no/such/images", "--data.image_size=8"],
            "no/such",
        ),
        (["--no_such_flag=1"], "no_such_flag"),
        (["--modle.lr=1"], "unrecognized arguments: --modle.lr=1; did you mean --model.lr? ("),
        (["--model.bach_size=8"], "--model.bach_size=8; did you mean --model.batch_size? ("),
        (["--config={tmp_path}/option.yaml"], "'trainer.max_step'; did you mean trainer.max_steps? ("),
        (["--denoiser.pretraind=x"], "Option 'pretraind' is not accepted; did you mean pretrained_path? ("),
        (["--sampler.anchr=ddim"], "Option 'anchr' is not accepted; did you mean anchor? ("),
        (["--model.learning_rate=1"], "unrecognized arguments: --model.learning_rate=1 ("),
        (["--trainer.lr=1"], "unrecognized arguments: --trainer.lr=1; did you mean --model.lr? ("),
        (["--trainer.logger.save_dir={tmp_path}/typo.yaml"], "--trainer.logger.save_dir: '"),
        (["--sampler.learn=mu"], "learn: expected a list, such as [mu], got mu. ("),
        (["--sampler.xyz=ddim"], "sampler: 'ddss_lightning.GGDMSampler': Option 'xyz' is not accepted ("),
        (["--config={tmp_path}/typo.yaml"], "loss: 'ddss_lightning.KIDLos': module 'ddss_lightning' has no attribute"),
        (["--data=ddss_lightning.ImageFolderDataModule"], "the following arguments are required: root, image_size"),
        (["--data.root=x"], "data: 'ddss_lightning.DigitsDataModule': Option 'root' is not accepted"),
        (["--model.lr=-1"], "lr must be a number of at least 0, got -1.0"),
        (["--model.time_lr=.inf"], "time_lr must be a number of at least 0, got inf"),
        (["--model.final_lr_fraction=7"], "final_lr_fraction must be a number of at least 0 and at most 1, got 7.0"),
        (["--model.warmup_steps=-5"], "warmup_steps must be a number of at least 0, got -5"),
        (["--pictures.columns=0"], "columns must be at least 1, got 0"),
        (["--data.num_predict_images=-5"], "num_predict_images must be at least 1, got -5"),
        (["--quality.dirpath={tmp_path}/typo.yaml"], "typo.yaml' is no folder, for"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, flags, message):
    (tmp_path / "typo.yaml").write_text("loss: {class_path: ddss_lightning.KIDLos}\n")
    (tmp_path / "option.yaml").write_text("trainer: {max_step: 3}\n")
    flags = [flag.format(tmp_path=tmp_path) for flag in flags]
    assert message in error_of(capsys, quick("fit", tmp_path, *flags))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"3", b"model: 3", b"a: [1"], ids=str)
def test_a_file_that_is_no_recipe_is_named(tmp_path, capsys, content):
    (tmp_path / "r.yaml").write_bytes(content)
    assert f"'{tmp_path / 'r.yaml'}'" in error_of(capsys, quick("fit", tmp_path, f"--config={tmp_path / 'r.yaml'}"))
    assert f"'{tmp_path / 'r.yaml'}'" in error_of(capsys, ["compare", "-c", str(tmp_path / "r.yaml")])


def test_a_damaged_model_is_one_clear_line(tmp_path, capsys):
    shutil.copytree(DDPM, tmp_path / "m")
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert "could not be loaded" in error_of(
        capsys, quick("fit", tmp_path, f"--denoiser.pretrained_path={tmp_path / 'm'}")
    )


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "bad.ckpt").write_bytes(b"damaged")
    error = error_of(capsys, quick("fit", tmp_path, f"--ckpt_path={tmp_path / 'bad.ckpt'}"))
    # Not what torch says: it would advise to run what is in the file.
    assert f"'{tmp_path / 'bad.ckpt'}' is no checkpoint of a fit, or a damaged one" in error
    assert "weights_only" not in error


def test_nan_in_the_data_is_one_clear_line(tmp_path, capsys, monkeypatch):
    images = torch.full((20, 1, 8, 8), torch.nan)
    monkeypatch.setattr("ddss_lightning.data.digits.load_digits_tensors", lambda: (images, None))
    assert "NaN or infinite" in error_of(capsys, quick("fit", tmp_path))


def test_wrong_size_and_empty_folder(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    folder = ["--data=ddss_lightning.ImageFolderDataModule", f"--data.root={tmp_path / 'images'}"]
    assert "holds no image file" in error_of(capsys, quick("fit", tmp_path, *folder, "--data.image_size=8"))
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    assert "real images have shape (3, 8, 8)" in error_of(
        capsys, quick("fit", tmp_path, *folder, "--data.image_size=8")
    )
    grey = [*folder, "--data.image_channels=1", "--data.image_size=9"]
    assert "real images have shape (1, 9, 9)" in error_of(capsys, quick("fit", tmp_path, *grey))


def test_resume_against_another_model(tmp_path, capsys):
    main(quick("fit", tmp_path))
    (checkpoint,) = (tmp_path / "digits_5" / "version_0" / "checkpoints").glob("*.ckpt")
    from diffusers import UNet2DModel

    shutil.copytree(DDPM, tmp_path / "m")
    unet = UNet2DModel.from_pretrained(DDPM, subfolder="unet")
    with torch.no_grad():
        next(unet.parameters()).add_(1e-3)
    unet.save_pretrained(tmp_path / "m" / "unet")
    other = [f"--denoiser.pretrained_path={tmp_path / 'm'}", f"--ckpt_path={checkpoint}"]
    assert "The checkpoint belongs to the denoiser" in error_of(capsys, quick("fit", tmp_path, *other))
    other[1] = f"--pretrained_sampler={tmp_path / 'digits_5' / 'version_0' / 'sampler'}"
    assert "was learned for" in error_of(capsys, quick("predict", tmp_path, *other))


def test_output_folders_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    out = f"--images.output_dir={tmp_path / 'out'}"
    assert (
        "is not empty; give another output_dir or overwrite=True (on the command line `--images.output_dir=FOLDER`, "
        "`--images.overwrite=true`)"
    ) in error_of(capsys, quick("predict", tmp_path, out))
    main(quick("fit", tmp_path, f"--quality.dirpath={tmp_path / 's'}"))
    before = (tmp_path / "s" / "sampler.json").read_bytes()
    assert "already holds a sampler" in error_of(capsys, quick("fit", tmp_path, f"--quality.dirpath={tmp_path / 's'}"))
    assert (tmp_path / "s" / "sampler.json").read_bytes() == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_the_command_that_an_interrupted_fit_names(tmp_path, capsys):
    """The same one with the path of the checkpoint; a run of another folder keeps its recipe."""
    folder = tmp_path / "digits_5" / "night"
    flags = ["--trainer.logger.version=night", f"--quality.dirpath={tmp_path / 's'}"]
    main(quick("fit", tmp_path, *flags))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    main(quick("fit", tmp_path, *flags, "--trainer.max_steps=4", "--model.lr=0.5", f"--ckpt_path={checkpoint}"))
    assert torch.load(checkpoint, weights_only=False)["global_step"] == 4
    recipe = (folder / "config.yaml").read_text()
    assert "lr: 0.5" in recipe
    main(quick("fit", tmp_path, "--trainer.logger.version=day"))
    other = tmp_path / "digits_5" / "day" / "checkpoints" / "last.ckpt"
    assert f"'{folder}' holds a run; go on with it by --ckpt_path=last, or give another" in error_of(
        capsys, quick("fit", tmp_path, *flags, f"--ckpt_path={other}")
    )
    assert (folder / "config.yaml").read_text() == recipe


def test_one_command_starts_a_fit_and_goes_on_with_it_after_sigterm(tmp_path):
    flags = ["--trainer.max_steps=40", "--trainer.logger.version=night", "--interruption.minutes=0", "--ckpt_path=last"]
    command = [sys.executable, "-m", "ddss_lightning.cli", *quick("fit", tmp_path, *flags)]
    folder = tmp_path / "digits_5" / "night"
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (folder / "checkpoints" / "last.ckpt").exists() and first.poll() is None:
        time.sleep(0.01)
    first.terminate()
    output = first.communicate()[1]
    assert first.returncode == 143, output
    step = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 40
    assert f"SIGTERM after step {step}: saved '{folder / 'checkpoints' / 'last.ckpt'}'. To go on: " in output
    assert "Traceback" not in output
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stderr
    assert f"Restored all states from the checkpoint at {folder / 'checkpoints' / 'last.ckpt'}" in second.stderr
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 40
    assert [path.name for path in (tmp_path / "digits_5").iterdir()] == ["night"]


@pytest.mark.parametrize("ended", ["cut off", "killed"])
def test_the_command_of_a_fit_that_ended_before_its_first_checkpoint_starts_it_again(tmp_path, monkeypatch, ended):
    """It was refused for ever: its folder held a recipe, and after a kill the sampler that it started from."""
    flags = ["--trainer.logger.version=night", "--ckpt_path=last"]
    with monkeypatch.context() as patch:
        where = (SampleQuality, "_score") if ended == "cut off" else (DDSSModule, "training_step")
        patch.setattr(*where, lambda *_: (_ for _ in ()).throw(RuntimeError("the power failed")))
        with pytest.raises(SystemExit):
            main(quick("fit", tmp_path, *flags))
    folder = tmp_path / "digits_5" / "night"
    assert (folder / "config.yaml").is_file()
    assert (folder / "sampler" / "sampler.json").is_file() == (ended == "killed")
    main(quick("fit", tmp_path, *flags, "--model.lr=0.25"))
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert "lr: 0.25" in (folder / "config.yaml").read_text()


def test_the_checkpoint_of_another_fit_is_not_overwritten(tmp_path, capsys):
    flags = [f"--interruption.dirpath={tmp_path / 'states'}"]
    main(quick("fit", tmp_path, *flags))
    before = (tmp_path / "states" / "last.ckpt").read_bytes()
    error = error_of(capsys, quick("fit", tmp_path, *flags, "--model.seed=6"))
    assert "last.ckpt' is the checkpoint of another fit; go on with it (ckpt_path), or give another folder" in error
    assert (tmp_path / "states" / "last.ckpt").read_bytes() == before


def test_the_seed_of_everything_is_that_of_learning(tmp_path, capsys):
    flags = ["-c", RECIPE, *QUICK, f"--trainer.logger.save_dir={tmp_path}"]
    assert command_line([*flags, "--seed_everything=7"], run=False).model.seed == 7
    assert command_line([*flags, "--seed_everything=7", "--model.seed=3"], run=False).model.seed == 3
    assert command_line([*flags, "--seed_everything=7", "--model.seed=0"], run=False).model.seed == 0
    assert command_line(flags, run=False).model.seed == 0


def test_a_shipped_sampler_is_learned_further(tmp_path):
    main(quick("fit", tmp_path, f"--pretrained_sampler={ROOT / 'checkpoints' / 'digits-ggdm-10'}"))
    learned = GGDMSampler.from_pretrained(tmp_path / "digits_5" / "version_0" / "sampler")
    assert learned.num_steps == 10
    assert set(learned.corrections) == {"mu", "nu", "std", "time"}


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert ddss_lightning.__version__ in capsys.readouterr().out


def test_the_console_script_exits_with_the_right_status():
    ddss = Path(sys.executable).parent / "ddss"
    good = subprocess.run([ddss, "fit", "-c", RECIPE, "--print_config"], capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stderr
    bad = subprocess.run([ddss, "fit", "-c", "none.yaml"], capture_output=True, text=True, check=False)
    assert bad.returncode != 0
    assert "none.yaml" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_objects_of_a_recipe_leave_no_file_behind(tmp_path, monkeypatch):
    flags = ["-c", RECIPE, *QUICK, "--trainer.logger=false", f"--trainer.default_root_dir={tmp_path}"]
    cli = command_line(flags, run=False)
    cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_run_goes_on_with_the_scores_it_has(tmp_path, capsys):
    """Steps after the last validation are scored; other scores are refused, and the recipe stays."""
    flags = ["--trainer.logger.version=night", "--ckpt_path=last", "--data.steps_per_epoch=3"]
    main(quick("fit", tmp_path, *flags))
    folder = tmp_path / "digits_5" / "night"
    recipe = (folder / "config.yaml").read_bytes()
    for other, named in (
        ("--data.num_val_images=40", "num_val_images: 24 instead of 40"),
        ("--model.seed=3", "seed: 0 instead of 3"),
        ("--sampler.num_steps=6", "another sampler"),
    ):
        error = error_of(capsys, quick("fit", tmp_path, *flags, "--trainer.max_steps=4", other))
        assert named in error
    # Refused before the checkpoint is accepted: nothing is written.
    error_of(capsys, quick("fit", tmp_path, *flags, "--sampler.num_steps=6"))
    assert b"num_steps: 5" in (folder / "config.yaml").read_bytes()
    assert b"num_steps: 5" in recipe
    error = error_of(capsys, quick("test", tmp_path, "--trainer.logger.version=night", "--ckpt_path=last"))
    assert "--ckpt_path=last is for fit" in error
    # A log folder serves where a sampler is asked for, whatever the recipe's own would be.
    main(quick("test", tmp_path, f"--pretrained_sampler={folder}"))
    main(quick("test", tmp_path, f"--pretrained_sampler={folder}", "--sampler.timesteps=[900.0, 1.0]"))
    assert "timesteps" in error_of(capsys, quick("test", tmp_path, "--sampler.timesteps=[900.0, 1.0]"))


def test_a_fit_that_began_with_a_saved_sampler_goes_on(tmp_path, capsys):
    """By the one command, to the last bit; of another configuration than the recipe's; what only scores takes one."""
    saved = f"--pretrained_sampler={ROOT / 'checkpoints' / 'digits-ggdm-10'}"
    whole, parts = (["--ckpt_path=last", f"--trainer.logger.version={name}", saved] for name in ("whole", "parts"))
    main(quick("fit", tmp_path, *whole, "--trainer.max_steps=4", "--model.final_lr_fraction=1.0"))
    for steps in (2, 4):
        main(quick("fit", tmp_path, *parts, f"--trainer.max_steps={steps}", "--model.final_lr_fraction=1.0"))
    found = [tmp_path / "digits_5" / name / "checkpoints" / "last.ckpt" for name in ("whole", "parts")]
    whole, parts = (torch.load(path, weights_only=True)["state_dict"] for path in found)
    assert whole["sampler.corrections.mu"].shape == (55,)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    error = error_of(capsys, quick("test", tmp_path, saved, f"--ckpt_path={found[0]}"))
    assert "Give --pretrained_sampler or --ckpt_path, not both" in error


def test_the_one_command_does_not_overwrite_the_sampler_of_another(tmp_path, capsys):
    flags = ["--trainer.logger.version=night", "--ckpt_path=last"]
    main(quick("fit", tmp_path, *flags))
    other = tmp_path / "other"
    shutil.copytree(ROOT / "checkpoints" / "digits-ggdm-10", other)
    error = error_of(capsys, quick("fit", tmp_path, *flags, "--trainer.max_steps=4", f"--quality.dirpath={other}"))
    assert "already holds a sampler" in error
    assert read_card(other)["nfe"] == 10
    main(quick("fit", tmp_path, *flags, "--trainer.max_steps=4"))


def test_what_is_called_last_but_is_not_there_starts_afresh_and_overwrites_nothing(tmp_path, capsys, caplog):
    best, flags = tmp_path / "best", ["--trainer.logger.version=night", "--ckpt_path=last"]
    main(quick("fit", tmp_path, f"--quality.dirpath={best}"))
    before = (best / "sampler.json").read_bytes()
    error = error_of(capsys, quick("fit", tmp_path, *flags, f"--quality.dirpath={best}"))
    assert "already holds a sampler" in error
    assert (best / "sampler.json").read_bytes() == before
    assert "there is no checkpoint in the folder of the run yet: a new fit" in caplog.text
    # The folder of the checkpoint has a name of its own: that of the logs need not have one.
    flags = [f"--interruption.dirpath={tmp_path / 'states'}", "--ckpt_path=last"]
    main(quick("fit", tmp_path, *flags))
    main(quick("fit", tmp_path, *flags, "--trainer.max_steps=4"))
    assert torch.load(tmp_path / "states" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_fit_that_is_not_validated_keeps_its_last_sampler(tmp_path):
    with pytest.warns(UserWarning, match="Nothing was validated: the last sampler is saved in"):
        cli = command_line(quick("fit", tmp_path, "--trainer.limit_val_batches=0"))
    saved = GGDMSampler.from_pretrained(tmp_path / "digits_5" / "version_0" / "sampler")
    for name, value in saved.state_dict().items():
        assert torch.equal(value, cli.model.averaged.state_dict()[name])
    assert any(value.any() for value in saved.corrections.values())
    assert read_card(tmp_path / "digits_5" / "version_0" / "sampler")["scores"] == {"training_step": 2, "seed": 0}


def test_predicted_images_take_the_place_of_those_before_and_are_not_kept_in_memory(tmp_path, caplog):
    flags = [f"--images.output_dir={tmp_path / 'out'}", "--images.overwrite=true", "--images.columns=1"]
    main(quick("predict", tmp_path, *flags, "--data.num_predict_images=5"))
    (tmp_path / "out" / "mine.png").write_text("precious")
    cli = command_line(quick("predict", tmp_path, *flags, "--data.num_predict_images=3"))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000.png", "00001.png", "00002.png", "grid.png", "mine.png"]
    assert "3 images and grid.png are in" in caplog.text
    assert not cli.trainer.predict_loop.predictions
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.size == (65, 65)


def test_a_fit_of_no_steps_keeps_nothing(tmp_path):
    main(quick("fit", tmp_path, "--trainer.max_steps=0"))
    assert not list(tmp_path.rglob("sampler.json"))


def test_a_logger_that_is_left_out_makes_a_new_folder_for_each_run(tmp_path, capsys):
    error = error_of(capsys, ["fit", "-c", RECIPE, *QUICK, "--trainer.logger=null", "--ckpt_path=last"])
    assert "give a name: --trainer.logger.version=NAME" in error


def test_ctrl_c_has_a_status_of_its_own(tmp_path, capsys, monkeypatch):
    """Lightning ends with that of bad input."""

    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddss_lightning.sampling.SamplingModule.predict_step", interrupted)
    monkeypatch.setattr("ddss_lightning.cli.compare", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    predict = quick("predict", tmp_path, f"--images.output_dir={tmp_path / 'out'}")
    try:
        for command, said in (
            (predict, "ddss: interrupted; the same command starts again with --images.overwrite=true"),
            (["compare", "-c", RECIPE], "ddss: interrupted; the same command goes on with what is missing"),
        ):
            with pytest.raises(SystemExit) as stopped:
                main(command)
            assert stopped.value.code == 130
            assert said in capsys.readouterr().err
    finally:
        signal.signal(signal.SIGINT, handler)


def test_sigterm_while_it_tests_has_its_status(tmp_path, capsys, monkeypatch):
    """Lightning ends without any, as if all were done, in the last batch, and where it predicts, it goes on."""

    def tell_in(name):
        step = getattr(SamplingModule, name)

        def told(module, *arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            return step(module, *arguments)

        monkeypatch.setattr(SamplingModule, name, told)

    tell_in("test_step")
    tell_in("predict_step")
    handler = signal.getsignal(signal.SIGTERM)
    parts = ["--data.num_test_images=40", "--data.eval_batch_size=10"]
    comparison = ["compare", "-c", RECIPE, "--steps=2", "--solvers=DDIM", "--num_images=40", "--selection_images=2"]
    for command, said in (
        (quick("test", tmp_path, *parts), "ddss: interrupted; the same command starts again"),
        ([*comparison, f"--output={tmp_path / 'out'}", parts[1]], "the same command goes on with what is missing"),
        (
            [*comparison, f"--output={tmp_path / 'two'}", "--seeds", "0", "1"],
            "ddss: interrupted; the same command goes on",
        ),
        (
            quick("predict", tmp_path, f"--images.output_dir={tmp_path / 'images'}"),
            "starts again with --images.overwrite",
        ),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 143
        assert said in capsys.readouterr().err
    # What was finished when the signal came is kept.
    kept = json.loads((tmp_path / "two" / "scores.json").read_text())["cells"]
    assert [key.split(" | ")[3] for key in kept if "test/" in key] == ["test/0"]
    assert signal.getsignal(signal.SIGTERM) == handler


@pytest.mark.parametrize("second", [(), ("TensorBoardLogger",)], ids=str)
def test_a_refused_fit_leaves_the_rows_of_the_one_that_is_there(tmp_path, capsys, second):
    """CSVLogger deletes them as soon as it is asked for its file."""
    where = {"save_dir": str(tmp_path), "name": "csv", "version": "a"}
    loggers = [
        {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": where} for name in ("CSVLogger", *second)
    ]
    command = ["fit", "-c", RECIPE, *QUICK, f"--trainer.logger={json.dumps(loggers)}"]
    main(command)
    rows = (tmp_path / "csv" / "a" / "metrics.csv").read_text()
    assert rows
    assert "holds a run; go on with it by --ckpt_path=last" in error_of(capsys, command)
    assert (tmp_path / "csv" / "a" / "metrics.csv").read_text() == rows


def test_a_damaged_last_checkpoint_is_told(tmp_path, capsys):
    flags = ["--trainer.logger.version=night", "--ckpt_path=last"]
    main(quick("fit", tmp_path, *flags))
    path = tmp_path / "digits_5" / "night" / "checkpoints" / "last.ckpt"
    whole = path.read_bytes()
    for part in (b"", whole[:5000]):
        path.write_bytes(part)
        assert f"'{path}' is no checkpoint of a fit, or a damaged one" in error_of(
            capsys, quick("fit", tmp_path, *flags)
        )


def test_a_fit_that_failed_before_it_began_does_not_hold_its_name(tmp_path, capsys):
    """But one with results does."""
    flags = ["--trainer.logger.version=x"]
    failing = [*flags, "--data=ddss_lightning.ImageFolderDataModule", f"--data.root={tmp_path / 'one'}"]
    (tmp_path / "one").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "one" / "a.png")
    failing += ["--data.image_size=8", "--data.image_channels=1"]
    assert "need at least two real images" in error_of(capsys, quick("fit", tmp_path, *failing))
    folder = tmp_path / "digits_5" / "x"
    assert not (folder / "config.yaml").exists()
    main(quick("fit", tmp_path, *flags))
    assert "DigitsDataModule" in (folder / "config.yaml").read_text()
    assert "holds a run" in error_of(capsys, quick("fit", tmp_path, *flags))


def test_folders_are_made_before_work(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("ddss_lightning.sampling.SamplingModule.encode_real", lambda *_: pytest.fail("work"))
    for part in ("interruption", "quality"):
        error = error_of(capsys, quick("fit", tmp_path, f"--{part}.dirpath={tmp_path / 'file'}"))
        assert f"{part}.dirpath: '{tmp_path / 'file'}' is no folder, for" in error


def test_without_a_logger_a_fit_leaves_the_models_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    before = sorted((ROOT / "checkpoints").iterdir())
    main(["fit", "-c", str(ROOT / RECIPE), *QUICK, "--trainer.logger=false"])
    assert sorted((ROOT / "checkpoints").iterdir()) == before
    assert (tmp_path / "runs" / "sampler" / "sampler.json").exists()
    # A quick look writes nothing, so it may be had beside a sampler.
    main(["fit", "-c", str(ROOT / RECIPE), *QUICK, "--trainer.logger=false", "--trainer.fast_dev_run=true"])


def test_a_judge_is_given_as_a_folder(tmp_path):
    judge = f"--quality.judge={ROOT / 'checkpoints' / 'digits-judge'}"
    cli = command_line(quick("fit", tmp_path, judge))
    assert type(cli.quality.judge).__name__ == "ResidualFeatures"
    assert "judge_fid" in cli.quality.best


def test_images_that_are_not_finite_are_no_files(tmp_path, capsys, monkeypatch):
    original = SamplingModule.predict_step

    def broken(self, batch, index):
        images = original(self, batch, index)
        return images.masked_fill((batch % 2 == 1)[:, None, None, None], torch.nan)

    monkeypatch.setattr(SamplingModule, "predict_step", broken)
    flags = [f"--images.output_dir={tmp_path / 'out'}", "--data.num_predict_images=5"]
    assert "2 of 5 images are not finite" in error_of(capsys, quick("predict", tmp_path, *flags))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["00000.png", "00002.png", "00004.png", "grid.png"]


def test_an_output_folder_in_use_is_refused_by_all_processes(tmp_path):
    """The first one looks, all end; the others waited for it."""
    (tmp_path / "mine.txt").write_text("precious")
    strategy = SimpleNamespace(broadcast=lambda problem: problem or "is not empty; give another output_dir")
    grey, pairs = (SimpleNamespace(denoiser=SimpleNamespace(image_shape=(channels, 8, 8))) for channels in (1, 2))
    alone = SimpleNamespace(strategy=SimpleNamespace(broadcast=str), is_global_zero=True)
    for first in (True, False):
        runner = SimpleNamespace(strategy=strategy, is_global_zero=first)
        with pytest.raises(ValueError, match="is not empty"):
            ImageWriter(str(tmp_path)).setup(runner, grey, "predict")
        with pytest.raises(ValueError, match="images have 2 channels, PNG files 1, 3 or 4"):
            ImageWriter(str(tmp_path / "new")).setup(runner, pairs, "predict")
    with pytest.raises(ValueError, match=r"mine.txt/out' cannot be made or written to; give another output_dir"):
        ImageWriter(str(tmp_path / "mine.txt" / "out")).setup(alone, grey, "predict")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    # There even who may write everywhere cannot make a folder.
    with pytest.raises(ValueError, match=r"The output folder '/proc/out' cannot be made .*; give another output_dir"):
        ImageWriter("/proc/out").setup(alone, grey, "predict")


def test_fewer_images_than_processes_are_refused():
    data = DigitsDataModule(num_predict_images=1)
    data.trainer = SimpleNamespace(world_size=2, global_rank=1)
    with pytest.raises(ValueError, match="1 images are too few for 2 processes"):
        data.predict_dataloader()


def test_a_fit_that_comes_to_nothing_leaves_no_folder(tmp_path, capsys):
    """The next one has its number; what was there before stays."""
    (tmp_path / "digits_5" / "version_0").mkdir(parents=True)
    (tmp_path / "digits_5" / "version_0" / "notes.txt").write_text("mine")
    wrong = quick("fit", tmp_path, "--model.teacher.num_pairs=4", "--loss=ddss_lightning.TeacherLoss")
    assert "needs as many teacher pairs" in error_of(capsys, wrong)
    assert [path.name for path in (tmp_path / "digits_5").iterdir()] == ["version_0"]
    kept = quick("fit", tmp_path, "--model.teacher.num_pairs=4", "--loss=ddss_lightning.TeacherLoss")
    error_of(capsys, [*kept, "--trainer.logger.version=0"])
    assert (tmp_path / "digits_5" / "version_0" / "notes.txt").exists()
    assert not (tmp_path / "digits_5" / "version_0" / "config.yaml").exists()


def test_a_fit_that_learns_nothing_says_so(tmp_path, capsys):
    with pytest.warns(UserWarning, match="No step was better than the start: the sampler is the initial one"):
        main(quick("fit", tmp_path, "--model.lr=1.0", "--model.time_lr=0", "--model.warmup_steps=0"))
    capsys.readouterr()
    run = str(tmp_path / "digits_5" / "version_0")
    main(["inspect", run])
    assert "no step of the fit was better than its start" in capsys.readouterr().out
    main(["export", run, str(tmp_path / "out")])
    assert "(no step of the fit was better than its start" in (tmp_path / "out" / "README.md").read_text()


def test_a_command_without_a_recipe_and_parts_of_one_s_own_that_fail(capsys, tmp_path, monkeypatch):
    for command in ("fit", "test"):
        assert f"`ddss {command}` needs a recipe: -c FILE" in error_of(capsys, [command, "--trainer.max_steps=1"])
    (tmp_path / "forgetful.py").write_text(
        "import torch, ddss_lightning\n"
        "class Forgot(ddss_lightning.Denoiser):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.network = torch.nn.Linear(2, 2)\n"
        "    def forward(self, x_t, timestep):\n"
        "        return x_t\n"
        "class Betas(Forgot):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.name, self.prediction_type, self.image_shape = 'mine', 'eps', (1, 8, 8)\n"
        "        self.schedule = torch.rand(9)\n"
        "class Epsilon(Betas):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.schedule = ddss_lightning.NoiseSchedule(torch.tensor([1.0, -1.0]))\n"
        "class Lookup(ddss_lightning.DiffusersDenoiser):\n"
        "    def forward(self, x_t, timestep):\n"
        "        return {}['boo']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = error_of(capsys, quick("fit", tmp_path, "--denoiser=forgetful.Forgot"))
    assert "error: Forgot has no attribute `name`; a Denoiser sets name, schedule" in found
    assert "Linear" not in found
    found = error_of(capsys, quick("fit", tmp_path, "--denoiser=forgetful.Betas"))
    assert "error: Betas.schedule must be a NoiseSchedule, got Tensor; use NoiseSchedule.from_scheduler(" in found
    found = error_of(capsys, quick("fit", tmp_path, "--denoiser=forgetful.Epsilon"))
    assert "error: Epsilon.prediction_type must be one of epsilon, sample, v_prediction," in found
    assert "got 'eps'. (" in found
    found = error_of(capsys, quick("fit", tmp_path, "--denoiser=forgetful.Lookup.from_pretrained"))
    assert "error: KeyError: 'boo' (" in found


def test_the_progress_bar_counts_epochs(tmp_path):
    cli = command_line(["-c", RECIPE, "--trainer.max_steps=23"], run=False)
    (bar,) = (each for each in cli.trainer.callbacks if isinstance(each, EpochProgressBar))
    shown = [(23, -1, 10), (20, -1, 10), (-1, -1, 10), (23, 5, 10)]
    for (max_steps, max_epochs, batches), said in zip(shown, ("0/2", "0/1", "0", "0/4"), strict=True):
        bar._trainer = SimpleNamespace(max_steps=max_steps, max_epochs=max_epochs, num_training_batches=batches)
        assert bar._get_train_description(0).split()[1] == said
    flags = ["--trainer.callbacks=lightning.pytorch.callbacks.TQDMProgressBar"]
    cli = command_line(["-c", RECIPE, *flags], run=False)
    assert [type(each).__name__ for each in cli.trainer.callbacks if isinstance(each, ProgressBar)] == [
        "TQDMProgressBar"
    ]
