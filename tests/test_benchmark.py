"""Sweeps: planned, learned, compared; finished and interrupted work is kept."""

import json
import sys

import pytest
import yaml

from ddss_lightning import DDSSModule, GGDMSampler
from ddss_lightning.cli import command_line
from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("at_root")


@pytest.fixture
def benchmark(monkeypatch):
    """The module that `python recipes/benchmark.py` runs."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    import benchmark

    return benchmark


ANCHOR = {"sampler": {"init_args": {"anchor": "ddim"}}}
SWEEP = {
    "base": "recipes/digits_5.yaml",
    "steps": [2, 3],
    "seeds": [0, 1],
    "only": {"first": {3: [0]}, "second": {3: [0]}},
    "by_steps": {"first": {3: ANCHOR}},
    "calls": {2: 220, 3: 1600},
    "validations": 2,
    "common": {
        "model": {"batch_size": 8},
        "data": {"init_args": {"num_val_images": 10, "num_test_images": 10}},
        "trainer": {"enable_progress_bar": False, "enable_model_summary": False},
    },
    "settings": {
        "first": {},
        "second": {
            "sampler": {"init_args": {"learn": ["time"]}},
            "model": {
                "ema_decay": 0,
                "gauss_newton": {"residual_images": 8, "trial_images": 8, "dampings": [0.1]},
            },
        },
    },
    "compare": {"solvers": ["DDIM"], "num_images": 12, "selection_images": 10},
}


def test_each_seed_has_teacher_pairs_of_its_own(benchmark, monkeypatch, tmp_path):
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    loss = {"class_path": "ddss_lightning.TeacherLoss", "init_args": {"distance": "l2"}}
    pairs = {"teacher": {"num_pairs": 16, "num_steps": 2}}
    settings = {"teacher": {"loss": loss, "model": pairs}, "none": {}}
    path.write_text(yaml.safe_dump({**SWEEP, "settings": settings, "only": {}, "by_steps": {}, "steps": [2]}))
    run(benchmark, monkeypatch, path, "--output", output, "--plan")
    models = {cell: yaml.safe_load((output / cell / "recipe.yaml").read_text())["model"] for cell in
              ("teacher/2-0", "teacher/2-1", "none/2-1")}  # fmt: skip
    assert models["teacher/2-0"]["teacher"] == {**pairs["teacher"], "seed": 0}
    assert models["teacher/2-1"]["teacher"] == {**pairs["teacher"], "seed": 1}
    assert models["teacher/2-1"]["seed"] == models["none/2-1"]["seed"] == 1
    assert "teacher" not in models["none/2-1"]


def test_comparisons_of_other_first_seeds_and_of_no_shared_ones_have_folders_of_their_own(
    benchmark, monkeypatch, tmp_path
):
    """The spacings of solvers are chosen with the first seed: scores of another cannot be gone on with."""
    found = []
    monkeypatch.setattr(benchmark, "compare", lambda *arguments: found.append(arguments[-1]))
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "only": {}, "by_steps": {}}))
    sweep = benchmark.Sweep.read(path)
    runs = benchmark.runs_of(sweep, tmp_path)
    (tmp_path / "compare").mkdir()
    (tmp_path / "compare" / "scores.json").write_text("{}")

    def folders(*cells):
        found.clear()
        benchmark.score(sweep, [each for each in runs if (each.steps, each.seed) in cells], tmp_path)
        return {each.output.name: (each.steps, each.seeds) for each in found}

    assert folders((2, 0), (3, 0), (2, 1), (3, 1)) == {"compare": ([2, 3], [0, 1])}
    assert folders((2, 1), (3, 1)) == {"compare-from-seed-1": ([2, 3], [1])}
    # No seed in common.
    assert folders((2, 0), (3, 1)) == {"compare-2": ([2], [0]), "compare-3-from-seed-1": ([3], [1])}


def run(benchmark, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    benchmark.main()


def test_a_sweep_is_planned_learned_compared_and_never_repeated(benchmark, monkeypatch, tmp_path):
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    # What is only planned can be planned otherwise.
    path.write_text(yaml.safe_dump({**SWEEP, "calls": {2: 500, 3: 2000}}))
    run(benchmark, monkeypatch, path, "--output", output, "--plan")
    path.write_text(yaml.safe_dump(SWEEP))
    run(benchmark, monkeypatch, path, "--output", output, "--plan")
    assert "6 runs" in (output / "plan.md").read_text()
    assert not list(output.glob("*/*/run.json"))

    run(benchmark, monkeypatch, path, "--output", output)
    made = {str(file.relative_to(output)): file.stat().st_mtime_ns for file in output.glob("*/*/run.json")}
    assert set(made) == {f"{s}/{cell}/run.json" for s in ("first", "second") for cell in ("2-0", "2-1", "3-0")}
    found = json.loads((output / "first" / "2-0" / "run.json").read_text())
    anchors = {
        cell: GGDMSampler.from_pretrained(output / "first" / cell / "sampler").config["anchor"]
        for cell in ("2-0", "3-0")
    }
    assert anchors == {"2-0": "dpmpp_2m", "3-0": "ddim"}
    # 8 images x 3 calls and gradients a step are 9 steps in 220 calls, of which every fourth is validated.
    assert (found["optimiser_steps"], found["network_calls"]) == (8, 192)
    assert "| 2 | second | 1 |" in (output / "learning.md").read_text()
    calls, fids = benchmark.curve(benchmark.Run("first", 2, 0, output / "first" / "2-0"), 24)
    # The last step is validated, whatever the number of steps.
    assert (calls[0], calls[-1], len(fids)) == (0, 192, 3)
    assert fids[0] == pytest.approx(found["validation_of_initial_sampler"]["fid"], rel=1e-6)
    rows = json.loads((output / "compare" / "table.json").read_text())["rows"]
    assert {(row["nfe"], row["sampler"], row["seed"]) for row in rows} == {
        (nfe, name, 0) for nfe in (2, 3) for name in ("DDIM", "first", "second")
    }
    rows = json.loads((output / "compare-2" / "table.json").read_text())["rows"]
    assert {(row["nfe"], row["seed"]) for row in rows} == {(2, 0), (2, 1)}

    run(benchmark, monkeypatch, path, "--output", output, "--steps", 2, "--release", "second", tmp_path / "released")
    released = tmp_path / "released-2"
    assert GGDMSampler.from_pretrained(released).num_steps == 2
    assert (released / "samples.png").is_file()
    assert "| **second** | learned |" in (released / "README.md").read_text()
    # A part that is run again does not take the place of the whole.
    assert {row["nfe"] for row in json.loads((output / "compare" / "table.json").read_text())["rows"]} == {2, 3}
    with pytest.raises(SystemExit):
        run(
            benchmark, monkeypatch, path, "--output", output, "--steps", 2, "--release", "second", tmp_path / "released"
        )
    assert made == {str(file.relative_to(output)): file.stat().st_mtime_ns for file in output.glob("*/*/run.json")}


def test_an_interrupted_run_goes_on_and_another_recipe_is_refused(benchmark, monkeypatch, tmp_path):
    path, output = tmp_path / "sweep.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(SWEEP))
    arguments = (path, "--output", output, "--no_compare", "--settings", "first", "--steps", 2, "--seeds", 0)
    step = DDSSModule.training_step

    def killed(module, *given):
        if module.global_step == 5:
            raise KeyboardInterrupt
        return step(module, *given)

    monkeypatch.setattr(DDSSModule, "training_step", killed)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(benchmark, monkeypatch, *arguments)
    monkeypatch.setattr(DDSSModule, "training_step", step)
    run(benchmark, monkeypatch, *arguments)
    whole = (path, "--output", tmp_path / "whole", *arguments[3:])
    run(benchmark, monkeypatch, *whole)
    resumed, plain = (
        json.loads((folder / "first/2-0/run.json").read_text()) for folder in (output, tmp_path / "whole")
    )
    assert (resumed["resumed"], plain["resumed"]) == (True, False)
    assert resumed["validation"] == plain["validation"]

    path.write_text(yaml.safe_dump({**SWEEP, "calls": {2: 500, 3: 1600}}))
    with pytest.raises(SystemExit, match="holds a run of another recipe; delete it"):
        run(benchmark, monkeypatch, *arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"only": {"frist": {2: [0]}}}, "`only` names 'frist'"),
        ({"only": {"first": {7: [0]}}}, "`only` names '7'"),
        ({"by_steps": {"first": {7: {}}}}, "`by_steps` names '7'"),
        ({"only": {"first": {2: [0]}}}, "at 2 steps the settings have different seeds"),
        ({"settings": {"a b": {}, "a-b": {}}}, "the setting 'a-b' needs another name"),
        ({"settings": {"a=b": {}}}, "the setting 'a=b' needs another name"),
        ({"settings": {"DDIM": {}}}, "the setting 'DDIM' has the name of a solver"),
        ({"calls": {2: 100}}, "`calls` has no budget for 3 steps"),
        ({"compare": {"solvers": ["Eular"]}}, "compare: Unknown solver 'Eular'"),
        ({"compare": {"judge": "nowhere"}}, "compare: .*nowhere"),
        ({"base": "recipes/none.yaml"}, "there is no base recipe 'recipes/none.yaml'"),
        ({"compare": {"pictures": 3}}, "compare: .*pictures"),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(benchmark, tmp_path, change, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "only": {}, **change}))
    with pytest.raises(SystemExit, match=message):
        benchmark.Sweep.read(path)


def test_a_budget_that_does_not_suffice_and_names_that_are_unknown(benchmark, monkeypatch, tmp_path, capsys):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "calls": {2: 10, 3: 10}}))
    with pytest.raises(SystemExit, match="one optimiser step takes 24 network calls, the budget leaves 10"):
        run(benchmark, monkeypatch, path, "--output", tmp_path / "out")
    with pytest.raises(SystemExit):
        run(benchmark, monkeypatch, path, "--output", tmp_path / "out", "--settings", "third")
    assert "'third' is not in" in capsys.readouterr().err
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(SWEEP))
    with pytest.raises(SystemExit):
        run(
            benchmark, monkeypatch, tmp_path / "good.yaml", "--output", tmp_path / "out", "--steps", "3", "--seeds", "1"
        )
    assert "no setting is run with these --steps, --seeds and --settings" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="is no sweep"):
        run(benchmark, monkeypatch, tmp_path / "none.yaml", "--output", tmp_path / "out")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "sweeps").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_sweeps_can_be_read(benchmark, path):
    sweep = benchmark.Sweep.read(path)
    assert len(benchmark.runs_of(sweep, path.parent)) >= len(sweep.steps)


@pytest.mark.slow
@pytest.mark.parametrize("sweep", sorted((ROOT / "recipes" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_sweep_can_be_planned(benchmark, monkeypatch, tmp_path, sweep, alexnet):
    """Two of them lost to a change of the recipe that they are based on."""
    run(benchmark, monkeypatch, sweep, "--output", tmp_path, "--plan")
    base = yaml.safe_load((sweep.parent / "digits.yaml" if sweep.stem == "mixture" else sweep).read_text())["base"]
    for recipe in tmp_path.rglob("recipe.yaml"):
        module = command_line(["-c", base, "-c", str(recipe)], run=False).model
        controlled = [part for part in module.loss.modules() if getattr(part, "control_variate", False)]
        # What was measured with Adam had plain KIDs.
        assert module.full_matrix or not controlled, recipe
