"""`ddss compare`: the same figures as `ddss test`, kept, gone on with after a kill, and the same on two processes."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler
from lightning.pytorch import Trainer
from torch import nn

from ddss_lightning.cli import command_line, main
from ddss_lightning.compare import Comparison, compare, parse, report
from ddss_lightning.compare.candidates import Candidate, learned_candidates, solver_candidates
from ddss_lightning.compare.report import markdown, not_in_table, short_table, starts
from ddss_lightning.compare.scores import Scores
from ddss_lightning.data import DigitsDataModule
from ddss_lightning.denoisers import DiffusersDenoiser, MixtureDenoiser
from ddss_lightning.features import ModuleFeatures, RandomFeatures, ResidualFeatures, load_any
from ddss_lightning.ggdm import GGDMSampler
from ddss_lightning.handmade import SOLVERS, solver_samplers
from ddss_lightning.images import to_pixels
from ddss_lightning.metrics import FrechetDistance
from ddss_lightning.module import DDSSModule
from ddss_lightning.noise import held_out_noise
from ddss_lightning.pictures import curves_figure
from ddss_lightning.schedule import NoiseSchedule
from tests.conftest import FEATURES, ROOT

RECIPE = str(ROOT / "recipes" / "digits_5.yaml")
SAMPLER = str(ROOT / "checkpoints" / "digits-ggdm-5")
SMALL = ["--num_images=60", "--selection_images=20", "--data.eval_batch_size=32"]

pytestmark = pytest.mark.usefixtures("at_root")


def command(output, *flags):
    return ["compare", "-c", RECIPE, *SMALL, "--output", str(output), *flags]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """The folder of a second feature network, with random weights."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    ResidualFeatures(1, 8, 8).save_pretrained(folder)
    return str(folder)


CALLS = []


@pytest.fixture(scope="module")
def finished(tmp_path_factory, judge):
    """Three samplers at two numbers of calls, two seeds and a judge, in one process; `CALLS` has the network calls."""
    folder = tmp_path_factory.mktemp("compare") / "out"
    flags = ["--steps", "2", "5", "--solvers", "DDIM", "Heun", "--samplers", SAMPLER, "--seeds", "3", "4"]
    flags += ["--judge", judge]
    original = DiffusersDenoiser.forward

    def counted(self, x, *arguments):
        CALLS.append(len(x))
        return original(self, x, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(DiffusersDenoiser, "forward", counted)
        main(command(folder, *flags))
    return folder, flags


def rows_of(folder):
    return json.loads((folder / "table.json").read_text())["rows"]


def fid_of(sampler, seed, denoiser, features):
    """Of the 60 images of the test noise of `seed`."""
    x_T, noise = held_out_noise(f"test/{seed}", list(range(60)), (1, 8, 8), sampler.num_steps)
    with torch.no_grad():
        metric = FrechetDistance(features(torch.cat(list(DigitsDataModule().real_dataloader()))))
        metric.update(features(to_pixels(sampler(denoiser, x_T, noise=noise))))
    return float(metric.compute())


def test_what_it_writes(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "scores.json", "table.md", "table.json", "fid.png", "judge_fid.png", "samples-2.png", "samples-5.png",
        "tensorboard",
    }  # fmt: skip
    table = json.loads((folder / "table.json").read_text())
    rows = {(row["sampler"], row["nfe"], row["seed"]) for row in table["rows"]}
    # Heun's method makes odd numbers of calls; the learned sampler makes 5.
    expected = {("DDIM", 2), ("DDIM", 5), ("Heun", 5), (f"learned ({SAMPLER})", 5)}
    assert rows == {(*each, seed) for each in expected for seed in (3, 4)}
    assert table["protocol"]["images"] == 60
    assert "ConvFeatures (" in table["protocol"]["features"]
    network = ResidualFeatures.from_pretrained(finished[1][-1])
    said = table["protocol"]["judge"]
    assert said.startswith(f"ResidualFeatures ({network.fingerprint()}); spacings are chosen by the FID of")
    text = (folder / "table.md").read_text()
    assert "| FID | IS | KID |" in text
    assert "| judge FID | judge KID | judge precision |" in text
    assert f"| 5 | learned ({SAMPLER}) | learned |" in text
    assert "- pixels: clamped to [-1, 1], rounded to 256 levels" in text


def test_scores_are_the_metric_on_the_test_noise(finished, denoiser, features, judge):
    (row,) = [row for row in rows_of(finished[0]) if row["sampler"].startswith("learned") and row["seed"] == 4]
    sampler = GGDMSampler.from_pretrained(SAMPLER)
    assert row["fid"] == pytest.approx(fid_of(sampler, 4, denoiser, features), rel=1e-5)
    second = ResidualFeatures.from_pretrained(judge)
    assert row["judge_fid"] == pytest.approx(fid_of(sampler, 4, denoiser, second), rel=1e-5)


def test_the_best_solver_is_told_as_the_start_of_a_recipe(finished, denoiser, features):
    rows = [row for row in rows_of(finished[0]) if not row["sampler"].startswith("learned")]
    for nfe in (2, 5):
        fids = {name: [row["fid"] for row in rows if (row["sampler"], row["nfe"]) == (name, nfe)] for name in SOLVERS}
        best = min((name for name, values in fids.items() if values), key=lambda name: sum(fids[name]))
        arguments = start_of(finished[0] / "table.md", best, nfe)
        sampler = GGDMSampler(denoiser.schedule, prediction_type="epsilon", **arguments)
        assert [fid_of(sampler, seed, denoiser, features) for seed in (3, 4)] == pytest.approx(fids[best], rel=1e-5)


def test_the_start_can_be_laid_over_a_recipe(tmp_path, denoiser):
    """Whatever that says of strides and of what is learned."""
    for name, spacing in (("UniPC 3", "quadratic"), ("DDIM", "linear")):
        sampler = dict(solver_samplers(name, denoiser.schedule, "epsilon", 5))[spacing]
        path = tmp_path / "table.md"
        path.write_text(starts([{"nfe": 5, "fid": 1.0}], [Candidate(name, 5, spacing, sampler)]))
        recipe = tmp_path / "start.yaml"
        recipe.write_text(yaml.safe_dump({"sampler": {"init_args": start_of(path, name, 5)}}))
        made = command_line(["-c", RECIPE, "-c", str(recipe)], run=False).model.sampler
        assert_same_steps(made, sampler)
        assert made.config["learn"] == ["mu", "nu", "std", "time", *(["logsnr"] if name == "DDIM" else [])]


def assert_same_steps(sampler, other):
    """But for what noise there would be, where its amount is learned."""
    mine, theirs = (vars(each.coefficients().detach()) for each in (sampler, other))
    for name in ("mu", "nu", "std", "pred", "timesteps"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-9, atol=1e-9)


def start_of(table, solver, nfe):
    """The line of `table.md` on this solver, as arguments."""
    lines = [each for each in table.read_text().splitlines() if each.startswith(f"- {solver}, ")]
    (arguments,) = [each for line in lines if (each := yaml.safe_load(line.split("`")[1]))["num_steps"] == nfe]
    return arguments


def test_starts_of_all_kinds_are_read_back_and_samplers_from_disk_are_none(denoiser, tmp_path):
    """A diffusers class with options, a formula with a stride, and times of a flow model; the lowest mean wins."""
    kinds = [
        ("UniPC 3", "quadratic", denoiser.schedule, "epsilon"),
        ("DDPM", "quadratic", denoiser.schedule, "epsilon"),
    ]
    flow = NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler())
    kinds += [("DDIM", "shift 3", flow, "flow_prediction")]
    for name, spacing, schedule, prediction_type in kinds:
        samplers = dict(solver_samplers(name, schedule, prediction_type, 4))
        worse = Candidate("Heun", 4, "linspace", samplers[spacing])
        learned = Candidate("mine", 4, "learned", samplers[spacing], "folder")
        candidates = [learned, worse, Candidate(name, 4, spacing, samplers[spacing]), worse]
        rows = [{"nfe": 4, "fid": fid} for fid in (0.1, 1.0, 2.0, None)]
        path = tmp_path / "table.md"
        path.write_text(starts(rows, candidates))
        assert "Heun" not in path.read_text()
        again = GGDMSampler(schedule, prediction_type=prediction_type, **start_of(path, name, 4))
        assert_same_steps(again, samplers[spacing])
    # One from disk, and one without a score.
    assert starts(rows[:1], candidates[:1]) == starts(rows[3:], candidates[3:]) == ""


def test_any_encoder_of_the_recipe_judges_and_the_flag_goes_before_it(finished, tmp_path, denoiser, judge):
    encoder = {"class_path": "ddss_lightning.RandomFeatures", "init_args": {"image_channels": 1, "image_size": 8}}
    (tmp_path / "judge.yaml").write_text(json.dumps({"quality": {"judge": encoder}}))
    flags = ["-c", str(tmp_path / "judge.yaml"), "--steps", "5", "--solvers", "--samplers", SAMPLER, "--seeds", "4"]
    main(command(tmp_path / "recipe", *flags))
    (row,) = rows_of(tmp_path / "recipe")
    second = RandomFeatures(image_channels=1, image_size=8)
    expected = fid_of(GGDMSampler.from_pretrained(SAMPLER), 4, denoiser, second)
    assert row["judge_fid"] == pytest.approx(expected, rel=1e-4)
    main(command(tmp_path / "flag", *flags, "--judge", judge))
    (row,) = rows_of(tmp_path / "flag")
    assert row in rows_of(finished[0])


def test_a_judge_scores_as_it_would_as_features_and_nothing_is_generated_for_it(finished, tmp_path, judge):
    flags = ["--steps", "5", "--solvers", "--samplers", SAMPLER, "--seeds", "3", "4", "--judge", FEATURES]
    flags += ["--features.class_path=ddss_lightning.ResidualFeatures.from_pretrained"]
    main(command(tmp_path / "out", *flags, f"--features.init_args.pretrained_path={judge}"))
    swapped = {row["seed"]: row for row in rows_of(tmp_path / "out")}
    for row in rows_of(finished[0]):
        if row["sampler"].startswith("learned"):
            other = swapped[row["seed"]]
            names = [name for name in other if name.startswith("judge_")]
            assert {"judge_fid", "judge_kid", "judge_is", "judge_precision", "judge_coverage"} <= set(names)
            for name in names:
                plain = name.removeprefix("judge_")
                assert row[plain] == pytest.approx(other[name], rel=1e-6)
                # Only one of the two networks has classes.
                assert (plain == "is") != (name in row)
                if name in row:
                    assert row[name] == pytest.approx(other[plain], rel=1e-6)
    # Placements of DDIM and Heun's method on 20 images (some are equal at 2 calls), two seeds on 60, a grid of 64.
    selected = [key for key in json.loads((finished[0] / "scores.json").read_text())["cells"] if "validation" in key]
    at_two = sum(" | 2 | " in key for key in selected)
    expected = 2 * (20 * at_two + 2 * 60 + 64) + 5 * (20 * (len(selected) - at_two) + 3 * (2 * 60 + 64))
    assert sum(CALLS) == expected


def test_finished_cells_are_not_computed_again(finished, monkeypatch, tmp_path):
    folder, flags = finished
    shutil.copytree(folder, tmp_path / "again")
    before = (folder / "table.json").read_bytes()

    def never(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr("lightning.pytorch.Trainer.test", never)
    monkeypatch.setattr("lightning.pytorch.Trainer.validate", never)
    main(command(tmp_path / "again", *flags))
    assert (tmp_path / "again" / "table.json").read_bytes() == before


def test_killed_and_started_again_it_ends_with_the_same_bytes(finished, tmp_path):
    folder, flags = finished
    arguments = [sys.executable, "-m", "ddss_lightning.cli", *command(tmp_path / "killed", *flags)]
    # As many threads as the run that it is compared with: their number moves the last digit.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    run = subprocess.Popen(arguments, cwd=ROOT, **quiet)
    scores, deadline = tmp_path / "killed" / "scores.json", time.time() + 200
    while time.time() < deadline and not (scores.exists() and len(json.loads(scores.read_text())["cells"]) >= 3):
        time.sleep(0.02)
    # Anywhere in a cell, not only at its end; a cell takes about this long.
    time.sleep(random.uniform(0, 0.3))
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "table.json").exists()
    kept = json.loads(scores.read_text())["cells"]
    assert len(kept) >= 3
    assert kept.items() < json.loads((folder / "scores.json").read_text())["cells"].items()
    main(command(tmp_path / "killed", *flags))
    for name in ("table.json", "scores.json", "table.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (folder / name).read_bytes()


def test_the_order_does_not_matter(finished, tmp_path):
    """Another order of solvers and of numbers of calls, from Python: the same scores to the last bit."""
    folder, _ = finished
    cli = command_line(["--config", RECIPE, "--data.eval_batch_size=32"], run=False)
    settings = Comparison(
        steps=(5, 2),
        solvers=("Heun", "DDIM"),
        samplers=(SAMPLER,),
        judge=finished[1][-1],
        seeds=(3, 4),
        num_images=60,
        selection_images=20,
        output=str(tmp_path / "other"),
    )
    compare(cli.model, cli.datamodule, cli.trainer, settings)
    found, expected = (json.loads((path / "table.json").read_text())["rows"] for path in (tmp_path / "other", folder))

    def by_name(row):
        return row["nfe"], row["sampler"], row["seed"]

    assert [by_name(row) for row in found] != [by_name(row) for row in expected]
    assert sorted(found, key=by_name) == sorted(expected, key=by_name)
    assert (tmp_path / "other" / "scores.json").read_bytes() == (folder / "scores.json").read_bytes()


class Mine(MixtureDenoiser):
    """A model of one's own, with settings that JSON gives back as something else."""

    def settings(self):
        return {"size": (8, 8)}


def test_scores_of_another_layer_or_of_other_code_are_not_taken_for_these(features, schedule, tmp_path, monkeypatch):
    real = torch.cat(list(DigitsDataModule().real_dataloader()))
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh())

    def run(features, **options):
        denoiser = Mine(real, 0.1, schedule)
        module = DDSSModule(denoiser, GGDMSampler(schedule, 2), features)
        settings = Comparison(
            steps=[2], solvers=["DDIM"], num_images=20, selection_images=10, output=tmp_path, **options
        )
        compare(module, DigitsDataModule(eval_batch_size=20), Trainer(accelerator="cpu", logger=False), settings)
        return rows_of(tmp_path)[0]["fid"]

    def of(layer):
        return ModuleFeatures(encoder, (1, 8, 8), mean=(0.5,), std=(0.5,), layer=layer)

    first = run(of("1"))
    assert run(of("1")) == first
    with pytest.raises(ValueError, match=r"scores of another protocol \(different: features\)"):
        run(of("2"))
    monkeypatch.setattr("ddss_lightning.compare.protocol.inspect.getsource", lambda cls: "other code")
    with pytest.raises(ValueError, match=r"scores of another protocol \(different: model\)"):
        run(of("1"))


def test_the_bar_counts_what_is_to_be_done(finished, tmp_path, monkeypatch):
    """Network calls of selection and of scores; not those on disk already, nor what a solver cannot do."""
    bars = []

    class Bar:
        def __init__(self, *columns, **options):
            self.total, self.done, self.skipped = None, 0, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def add_task(self, description):
            return 0

        def advance(self, task, calls):
            self.done += calls

        def update(self, task, total=None, completed=None, description=None):
            self.total = self.total if total is None else total
            # One process: the batches add up to what was announced.
            assert completed is None or completed == self.done

    monkeypatch.setattr("ddss_lightning.compare.run.Progress", Bar)
    flags = ["--solvers", "Heun", "--samplers", SAMPLER, "--seeds", "3", "4"]
    main(command(tmp_path / "out", "--steps", "2", "5", *flags))
    # Six spacings of Heun's method on 20 images; two samplers and two seeds on 60; nothing at 2 calls.
    assert bars[-1].done == bars[-1].total == 5 * (6 * 20 + 2 * 2 * 60)
    main(command(tmp_path / "out", "--steps", "2", "5", *flags))
    assert bars[-1].done == bars[-1].total == 0
    main(command(tmp_path / "out", "--steps", "5", "3", *flags))
    # Two spacings of two steps are the same sampler.
    assert bars[-1].done == bars[-1].total == 3 * (4 * 20 + 2 * 60)


def test_a_sampler_that_is_not_finite_is_a_word_in_the_table(tmp_path, denoiser, capsys, monkeypatch):
    """The others have their scores, and it is not computed again."""
    sampler = GGDMSampler(denoiser.schedule, 3, learn=("mu",))
    sampler.corrections["mu"].data[0] = 1e30
    sampler.save_pretrained(tmp_path / "broken", {"name": denoiser.name, "fingerprint": denoiser.fingerprint()})
    flags = ["--steps", "3", "--solvers", "DDIM", "--samplers", str(tmp_path / "broken"), "--seeds", "0", "1"]
    with pytest.warns(UserWarning, match=r"No scores: .* not finite \(60 of 60\)"):
        main(command(tmp_path / "out", *flags))
    table = json.loads((tmp_path / "out" / "table.json").read_text(), parse_constant=pytest.fail)
    rows = {(row["sampler"][:4], row["seed"]): row for row in table["rows"]}
    for seed in (0, 1):
        assert rows["DDIM", seed]["fid"] > 0
        assert "not_finite" not in rows["DDIM", seed]
        assert rows["lear", seed]["not_finite"] == 60
        assert rows["lear", seed]["fid"] is rows["lear", seed]["recall"] is None
    cells = "3", f"learned ({tmp_path / 'broken'})", "learned", "120 of 120 images are not finite"
    assert list(cells) in [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert f"| {' | '.join(cells)} |  |" in (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "samples-3.png").is_file()
    before = (tmp_path / "out" / "table.json").read_bytes()
    monkeypatch.setattr("lightning.pytorch.Trainer.test", lambda *_, **__: pytest.fail("computed again"))
    main(command(tmp_path / "out", *flags))
    assert (tmp_path / "out" / "table.json").read_bytes() == before


def test_double_precision_and_grids_in_parts(tmp_path, denoiser):
    """The grid is made as the scores are: it failed in 64-true, after hours, and took all its images at once."""
    sizes, original = [], DiffusersDenoiser.forward

    def counted(self, x, *arguments):
        sizes.append((len(x), x.dtype))
        return original(self, x, *arguments)

    flags = ["--steps", "2", "--solvers", "DDIM", "--trainer.precision=64-true"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusersDenoiser, "forward", counted)
        main(command(tmp_path / "out", *flags))
    assert (tmp_path / "out" / "samples-2.png").exists()
    assert max(sizes) == (32, torch.float64)


def test_one_seed_that_is_not_finite_leaves_no_mean():
    row = {"sampler": "DDIM", "nfe": 5, "spacing": "leading", "fid": 2.0, "kid": 1.0}
    rows = [{**row, "seed": 0}, {**row, "seed": 1, "fid": None, "kid": None, "not_finite": 3}]
    assert "| 5 | DDIM | leading | 3 of 20 images are not finite |  |" in markdown(rows, {"images": 10})
    assert "| 5 | DDIM | leading | 2.00 | 1.00 |" in markdown(rows[:1], {"images": 10})


def test_every_solver_is_compared(denoiser, features):
    assert Comparison(solvers=["all"]).solver_names == list(SOLVERS)
    assert len(SOLVERS) == 16
    module = DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 5), features)
    found = solver_candidates(module, "DDIM", 5)
    assert len({each.key() for each in found}) == len(found) == len(SOLVERS["DDIM"])
    assert {(each.name, each.nfe) for each in found} == {("DDIM", 5)}


@pytest.mark.parametrize(
    "launcher", [[], ["torch.distributed.run", "--nproc_per_node=2", "-m"]], ids=["ddss", "torchrun"]
)
def test_two_processes_find_the_same_scores(finished, tmp_path, launcher):
    folder, _ = finished
    flags = ["--steps", "5", "--solvers", "DDIM", "--seeds", "3", "--judge", finished[1][-1]]
    flags += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    arguments = [sys.executable, "-m", *launcher, "ddss_lightning.cli", *command(tmp_path / "two", *flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    (row,) = json.loads((tmp_path / "two" / "table.json").read_text())["rows"]
    rows = json.loads((folder / "table.json").read_text())["rows"]
    (expected,) = [r for r in rows if (r["sampler"], r["nfe"], r["seed"]) == ("DDIM", 5, 3)]
    assert row["spacing"] == expected["spacing"]
    for name in ("fid", "kid", "is", "judge_fid", "judge_kid"):
        # The features are float32; batches of other sizes round them differently.
        assert row[name] == pytest.approx(expected[name], rel=1e-4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--solvers", "RK4"], "Unknown solver 'RK4'; choose any of DDPM, DDIM"),
        (["--num_images=5"], "--num_images must be at least 6, got 5"),
        (["--pretrained_sampler", SAMPLER], "does not look at --pretrained_sampler; give --samplers FOLDER"),
        (["--data.num_test_images=7"], "does not look at --data.num_test_images; give --num_images"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--samplers", "nowhere"], "There is no folder 'nowhere'"),
        (["--solvers"], "Nothing to compare: give --solvers or --samplers"),
        (["--solvers", "none"], "or all; --solvers without a name compares learned samplers only"),
        (
            ["--samplers", SAMPLER, "--steps", "3", "7"],
            f"None of --samplers makes [3, 7] network calls ('{SAMPLER}' makes 5); give other --steps",
        ),
        (["--solvers", "Heun", "--steps", "2"], "Nothing to compare: no solver makes [2] network calls"),
        (["--samplers", SAMPLER, SAMPLER], "is given 2 times; give every sampler once"),
        (
            ["--steps", "5", "--trainer.limit_test_batches=1", "--solvers", "--samplers", SAMPLER],
            "32 images were scored",
        ),
        (["--data.eval_batch_size=0"], "eval_batch_size must be at least 1, got 0"),
        (["--judge", "nowhere"], "No feature network in 'nowhere': there is no such folder"),
        (["--judge", FEATURES], "The judge is the feature network of learning (dc2320f1a18d7978); give another one"),
        (["--steps", "a"], "argument --steps: invalid int value: 'a'; see `ddss compare --help`"),
        (["--num_image", "6"], "did you mean --num_images?"),
        (["--samplers", f"DDIM={SAMPLER}"], "is the name of a solver; give another label"),
    ],
)
def test_bad_input_is_one_line(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command(tmp_path / "out", *flags))
    assert stop.value.code == 1
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1]
    assert not (tmp_path / "out" / "table.md").exists()


def test_another_protocol_is_not_mixed_in(finished, tmp_path, capsys):
    folder, flags = finished
    shutil.copytree(folder, tmp_path / "out")
    plain = flags[: flags.index("--judge")]
    # With a judge and then without, and the other way round.
    main(command(tmp_path / "plain", "--steps", "5", "--solvers", "--samplers", SAMPLER, "--seeds", "3"))
    cases = ("out", [*flags, "--num_images=61"], "images"), ("out", plain, "judge"), ("plain", flags, "judge")
    for name, given, different in cases:
        with pytest.raises(SystemExit):
            main(command(tmp_path / name, *given))
        said = f"holds scores of another protocol (different: {different}); give another --output"
        assert said in capsys.readouterr().err


def test_a_judge_of_other_images_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    ResidualFeatures(3, 16, 8).save_pretrained(tmp_path / "judge")
    monkeypatch.setattr(DiffusersDenoiser, "forward", lambda *_: pytest.fail("work"))
    monkeypatch.setattr(DigitsDataModule, "real_images", lambda _: pytest.fail("work"))
    with pytest.raises(SystemExit):
        main(command(tmp_path / "out", "--judge", str(tmp_path / "judge")))
    assert (
        "The judge takes images of shape (3, 16, 16), the model 'checkpoints/digits-ddpm' makes (1, 8, 8) (channels, "
        "height, width); give a feature network for such images."
    ) in capsys.readouterr().err


def test_a_sampler_of_each_seed_is_scored_on_its_own_noise(finished, tmp_path, denoiser, features):
    shutil.copytree(SAMPLER, tmp_path / "run-3")
    other = GGDMSampler(denoiser.schedule, 5, anchor="ddim", stride="quadratic")
    other.save_pretrained(tmp_path / "run-4", {"name": denoiser.name, "fingerprint": denoiser.fingerprint()})
    flags = ["--steps", "5", "--solvers", "--samplers", f"mine={tmp_path}/run-{{seed}}", "--seeds", "3", "4"]
    main(command(tmp_path / "out", *flags))
    rows = {row["seed"]: row for row in rows_of(tmp_path / "out")}
    assert {row["sampler"] for row in rows.values()} == {"mine"}
    assert [rows[seed]["folder"] for seed in (3, 4)] == [f"{tmp_path}/run-{seed}" for seed in (3, 4)]
    for seed, sampler in ((3, GGDMSampler.from_pretrained(SAMPLER)), (4, other)):
        assert rows[seed]["fid"] == pytest.approx(fid_of(sampler, seed, denoiser, features), rel=1e-5)
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| 5 | mine | learned |")]
    assert f"| {(rows[3]['fid'] + rows[4]['fid']) / 2:.2f} ±" in line


def test_another_label_is_no_other_sampler(finished, tmp_path, monkeypatch):
    folder, flags = finished
    shutil.copytree(folder, tmp_path / "out")
    for run in ("test", "validate"):
        monkeypatch.setattr(f"lightning.pytorch.Trainer.{run}", lambda *_, **__: pytest.fail("computed again"))
    main(command(tmp_path / "out", *[f"mine={SAMPLER}" if flag == SAMPLER else flag for flag in flags]))
    found, before = rows_of(tmp_path / "out"), rows_of(folder)
    assert [row["sampler"] for row in found if row["spacing"] == "learned"] == ["mine", "mine"]
    assert [{**row, "sampler": ""} for row in found] == [{**row, "sampler": ""} for row in before]


def test_what_labels_and_seeds_must_be(tmp_path, denoiser, features):
    module = DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 5), features)
    for name, num_steps in (("a", 3), ("b", 4), ("c", 3), ("seed0", 3), ("seed1", 3), ("calls0", 3), ("calls1", 4)):
        GGDMSampler(denoiser.schedule, num_steps).save_pretrained(tmp_path / name)
    GGDMSampler(denoiser.schedule, 3).save_pretrained(tmp_path / "lr=0.1")

    def candidates(*texts, seeds=(0, 1)):
        return learned_candidates(module, [text.replace("@", str(tmp_path)) for text in texts], seeds)

    def refused(message, *texts, seeds=(0, 1)):
        with pytest.raises(ValueError, match=message):
            candidates(*texts, seeds=seeds)

    found = candidates("x=@/a", "x=@/b", "y=@/seed{seed}", "@/lr=0.1", "z=@/c")
    assert [{c.name for c in by_seed.values()} for by_seed in found] == [
        {"x"}, {"x"}, {"y"}, {f"learned ({tmp_path}/lr=0.1)"}, {"z"}
    ]  # fmt: skip
    assert [by_seed[0].nfe for by_seed in found] == [3, 4, 3, 3, 3]
    assert found[0][0] is found[0][1]
    assert [found[2][seed].folder for seed in (0, 1)] == [f"{tmp_path}/seed{seed}" for seed in (0, 1)]
    refused(
        r"seed\{seed\}' has no sampler for seed 2 of --seeds: There is no folder '.*/seed2'",
        "y=@/seed{seed}",
        seeds=(0, 1, 2),
    )
    refused(r"calls\{seed\}' make 3 or 4 network calls, depending on the seed; give samplers", "@/calls{seed}")
    refused(r"/a' and '.*/c' both make 3 network calls and have the label 'x'; give them two labels", "x=@/a", "x=@/c")
    refused("/a' is given 2 times; give every sampler once", "x=@/a", "y=@/a")


def row_of(sampler, nfe, fid, spacing="learned", seed=0):
    return {"sampler": sampler, "spacing": spacing, "nfe": nfe, "seed": seed, "fid": fid, "judge_fid": 10 * fid}


def test_curves_of_two_samplers_of_one_size_are_two_lines():
    one = [row_of(f"learned ({nfe})", nfe, 1.0) for nfe in (5, 10)]
    two = [*one, row_of("learned (other)", 5, 1.0)]
    labelled = [row_of(name, nfe, 1.0) for name in ("x", "y") for nfe in (5, 10)]
    cases = (one, ["learned"]), (two, ["learned (5)", "learned (10)", "learned (other)"]), (labelled, ["x", "y"])
    for rows, lines in cases:
        (axes,) = curves_figure(rows).axes
        assert [line.get_label() for line in axes.lines] == lines


def test_curves_show_the_mean_and_the_band_of_the_seeds():
    values = {5: (4.0, 6.0), 10: (1.0, 2.0)}
    rows = [row_of("x", nfe, fid, seed=seed) for nfe, pair in values.items() for seed, fid in enumerate(pair)]
    rows += [row_of("DDIM", nfe, 20.0, "linear", seed) for nfe in (5, 10) for seed in (0, 1)]
    for score, scale in (("fid", 1), ("judge_fid", 10)):
        (axes,) = curves_figure(rows, score).axes
        x, ddim = axes.lines
        assert x.get_xydata().tolist() == [[5, 5 * scale], [10, 1.5 * scale]]
        band = {tuple(point) for point in axes.collections[0].get_paths()[0].vertices.tolist()}
        assert band >= {(5, 4 * scale), (5, 6 * scale), (10, 1 * scale), (10, 2 * scale)}
        assert axes.get_yscale() == "log"
        assert x.get_linewidth() > 2 * ddim.get_linewidth()
        assert x.get_zorder() > ddim.get_zorder()


def test_of_one_number_of_calls_the_lowest_mean_stands_first():
    rows = [row_of("DDIM", 5, fid, "linear", seed) for seed, fid in enumerate((20.0, 40.0))]
    rows += [row_of("x", 5, fid, seed=seed) for seed, fid in enumerate((4.0, 6.0))]
    rows += [row_of("none", 5, 1.0) | {"fid": None}]
    (axes,) = curves_figure(rows).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["x", "DDIM"]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[5.0], [30.0]]
    spans = [[tuple(point) for point in each.get_segments()[0]] for each in axes.collections]
    assert spans == [[(4.0, 0), (6.0, 0)], [(20.0, 1), (40.0, 1)]]
    assert [text.get_text() for text in axes.texts] == ["5", "30"]
    assert axes.get_ylim() == (1.5, -0.5)  # the first one on top


@pytest.mark.parametrize("nfes", [(5,), (5, 10)], ids=str)
def test_scores_below_zero_are_drawn_and_those_of_a_part_of_the_seeds_are_not(nfes):
    """Of small sets an unbiased distance can be; a mean over some of the seeds would look better than it is."""
    rows = [
        row_of(name, nfe, fid, seed=seed) for nfe in nfes for name, fid in (("x", -0.5), ("y", 1.0)) for seed in (0, 1)
    ]
    rows += [row_of("z", nfe, 0.1) for nfe in nfes] + [row_of("z", nfe, 1.0, seed=1) | {"fid": None} for nfe in nfes]
    (axes,) = curves_figure(rows).axes
    drawn = [line.get_xdata() if len(nfes) == 1 else line.get_ydata() for line in axes.lines]
    assert sorted(float(values[0]) for values in drawn) == [-0.5, 1.0]
    assert (axes.get_xscale() if len(nfes) == 1 else axes.get_yscale()) == "linear"


def test_sixteen_solvers_are_told_apart_by_colour_and_marker():
    (axes,) = curves_figure([row_of(name, nfe, 1.0, "linear") for name in SOLVERS for nfe in (5, 10)]).axes
    looks = {(line.get_color(), line.get_marker()) for line in axes.lines}
    assert len(looks) == len(SOLVERS) == 16


def test_small_scores_have_three_figures():
    row = {"sampler": "DDIM", "nfe": 5, "spacing": "leading", "seed": 0, "fid": 123.456, "judge_fid": 0.012345}
    assert "| 5 | DDIM | leading | 123.46 | 0.0123 |" in markdown([row], {"images": 10})
    # JSON has no NaN.
    assert "| 5 | DDIM | leading | 123.46 | nan |" in markdown([{**row, "judge_fid": None}], {"images": 10})


def test_the_terminal_has_the_main_scores_in_columns():
    row = {"sampler": "DDIM", "nfe": 5, "spacing": "leading", "fid": 123.456, "is": 9.0, "kid": -1.5, "judge_fid": 1.0}
    rows = [{**row, "seed": 0}, {**row, "seed": 1}, {**row, "nfe": 10, "seed": 0}, {**row, "nfe": 10, "seed": 1}]
    rows[1]["fid"] += 2
    assert short_table(rows, 10).splitlines() == [
        "calls  sampler  spacing  FID            KID           judge FID",
        "-----  -------  -------  -------------  ------------  -----------",
        "5      DDIM     leading  124.46 ± 1.41  -1.50 ± 0.00  1.00 ± 0.00",
        "10     DDIM     leading  123.46 ± 0.00  -1.50 ± 0.00  1.00 ± 0.00",
    ]
    text = markdown(rows, {"images": 10})
    assert text.startswith(
        "| calls | sampler | spacing | FID | IS | KID | judge FID |\n|---|---|---|---|---|---|---|\n"
    )


def test_scores_that_are_no_rows_are_counted():
    cells = [f"{name} | 5 | 0a | {split}/0 | 60" for name in ("a", "b", "c") for split in ("test", "validation")]
    assert not_in_table(cells, cells[:1]) == "2 more scores in scores.json are not in this table\n"
    assert not_in_table(cells, [cells[0], cells[2]]) == "1 more score in scores.json is not in this table\n"
    assert not_in_table(cells, cells) == ""


def test_a_smaller_selection_says_what_it_leaves_out(finished, tmp_path, capsys):
    folder, flags = finished
    shutil.copytree(folder, tmp_path / "out")
    names = {path.name for path in folder.iterdir()}
    flags = ["--steps", "5", "--solvers", "--samplers", SAMPLER, "--seeds", "3", "4", *flags[-2:]]
    main(command(tmp_path / "out", *flags))
    assert len(rows_of(tmp_path / "out")) == 2
    # DDIM at two numbers of calls and Heun's method at one, of two seeds each.
    said = "\n6 more scores in scores.json are not in this table\n"
    assert (tmp_path / "out" / "table.md").read_text().endswith(said)
    assert said in capsys.readouterr().out
    assert "more score" not in (folder / "table.md").read_text()
    assert (tmp_path / "out" / "scores.json").read_bytes() == (folder / "scores.json").read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


@pytest.mark.parametrize(("seeds", "title"), [((0,), "same noise"), ((3, 4), "same noise, seed 3")])
def test_grids_of_one_of_several_seeds_say_which(tmp_path, monkeypatch, seeds, title):
    titles = []
    original = report.comparison_figure
    monkeypatch.setattr(report, "comparison_figure", lambda grids, text: titles.append(text) or original(grids, text))
    main(command(tmp_path / "out", "--steps", "2", "--solvers", "DDIM", "--seeds", *map(str, seeds)))
    assert titles == [f"2 network calls, {title}"]


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"protocol": {}, "cells": 3}'])
def test_damaged_scores_are_told(content, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"The scores in '.*scores\.json' are damaged .*; delete the file, or give"):
        Scores(path, {})


def test_two_comparisons_in_one_folder_keep_the_scores_of_both(tmp_path):
    """At the same time; another protocol in between is told, and its scores stay."""
    path = tmp_path / "scores.json"
    one, other = Scores(path, {"images": 10}), Scores(path, {"images": 10})
    one.put("one", {"fid": 1.0})
    other.put("two", {"fid": 2.0})
    one.put("three", {"fid": 3.0})
    assert Scores(path, {"images": 10}).cells == {"one": {"fid": 1.0}, "two": {"fid": 2.0}, "three": {"fid": 3.0}}
    # Of several processes one alone writes: what it finds there must not change what it takes for known.
    assert one.cells == {"one": {"fid": 1.0}, "three": {"fid": 3.0}}
    path.unlink()
    Scores(path, {"images": 20}).put("one", {"fid": 4.0})
    with pytest.raises(ValueError, match=r"another protocol \(different: images\)"):
        other.put("four", {"fid": 5.0})
    assert Scores(path, {"images": 20}).cells == {"one": {"fid": 4.0}}


def test_recipes_lie_on_top_of_each_other(tmp_path):
    recipes, settings, others = parse(["-c", "a.yaml", "--config=b.yaml", "--steps", "3", "--data.root=x"])
    assert (recipes, settings.steps, others) == (["a.yaml", "b.yaml"], [3], ["--data.root=x"])


def test_files_of_the_user_are_not_replaced(tmp_path, capsys):
    (tmp_path / "table.md").write_text("mine")
    with pytest.raises(SystemExit):
        main(command(tmp_path, "--steps", "2", "--solvers", "DDIM"))
    assert "holds table.md, which would be replaced, and no scores of a comparison" in capsys.readouterr().err
    assert (tmp_path / "table.md").read_text() == "mine"


def test_what_is_named_twice_is_measured_once():
    settings = Comparison(steps=[5, 5, 2], solvers=["DDIM", "DDIM"], seeds=[0, 0])
    assert (settings.steps, settings.solver_names, settings.seeds) == ([5, 2], ["DDIM"], [0])


def write_scores(path, name, num):
    scores = Scores(path, {"images": 10})
    for index in range(num):
        scores.put(f"{name}{index}", {"fid": 1.0})


def test_no_score_is_lost_when_comparisons_write_at_once(tmp_path):
    path, context = tmp_path / "scores.json", multiprocessing.get_context("fork")
    writers = [context.Process(target=write_scores, args=(path, name, 40)) for name in "abc"]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    assert len(Scores(path, {"images": 10}).cells) == 120
    assert [each.name for each in tmp_path.iterdir()] == ["scores.json"]


def test_processes_at_different_samplers_are_told(denoiser, features, tmp_path, monkeypatch):
    """Another comparison has put a score into the folder that one process saw and the other did not."""
    trainer = Trainer(accelerator="cpu", logger=False)
    module = DDSSModule(denoiser, GGDMSampler(denoiser.schedule, 2), features)
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda of: f"not {of}" if isinstance(of, str) else of)
    settings = Comparison(steps=[2], solvers=["DDIM"], num_images=10, selection_images=10, output=tmp_path)
    with pytest.raises(ValueError, match=r"The processes found different scores in the output folder.*start again"):
        compare(module, DigitsDataModule(eval_batch_size=10), trainer, settings)
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize("name", ["steps", "seeds"])
def test_something_must_be_compared(name):
    with pytest.raises(ValueError, match=f"--{name} must name at least one"):
        Comparison(**{name: ()})


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs" / "findings").glob("*-scores*.json")), ids=lambda path: path.stem
)
def test_committed_scores_are_of_the_shipped_networks_and_of_this_protocol(path):
    """Else they are refused as those of another one, where they are to spare the measuring."""
    protocol = json.loads(path.read_text())["protocol"]
    kind = "glyphs" if path.stem.startswith("glyphs") else "digits"
    features, judge = (load_any(str(ROOT / "checkpoints" / f"{kind}-{name}")) for name in ("features", "judge"))
    assert protocol["features"] == features.identity()
    assert protocol["resize"] == features.protocol()["resize"]
    assert protocol["judge"].startswith(f"{judge.identity()}; spacings")
    if path.stem != "mixture-scores":
        model = DiffusersDenoiser.from_pretrained(str(ROOT / "checkpoints" / f"{kind}-ddpm"))
        assert protocol["model"] == f"checkpoints/{kind}-ddpm ({model.fingerprint()})"
