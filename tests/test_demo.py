"""`recipes/demo.py`: nothing that was learned is lost."""

import sys

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = pytest.mark.usefixtures("at_root")


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Runs it on a small recipe, into `tmp_path/out`."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "recipes"), *sys.path])
    import demo as script

    recipe = yaml.safe_load((ROOT / "recipes" / "digits_5.yaml").read_text())
    recipe["model"]["batch_size"] = 8
    recipe["trainer"] |= {"max_steps": 2, "enable_progress_bar": False, "enable_model_summary": False}
    recipe["data"]["init_args"] |= {"steps_per_epoch": 2, "num_val_images": 24}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def run(*flags, recipe=tmp_path / "recipe.yaml"):
        common = ["--recipe", recipe, "--output", tmp_path / "out", "--num_images", 20]
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, (*common, *flags))])
        script.main()

    run.script = script
    return run


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_sampler_in_the_output_folder_is_measured_not_deleted(demo, tmp_path, capsys):
    demo()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "logs", "sampler", "samples.png", "table.json", "table.md",
    ]  # fmt: skip
    kept = everything(tmp_path / "out" / "sampler") | everything(tmp_path / "out" / "logs")
    for flags in ([], ["--sampler", tmp_path / "out" / "sampler"]):
        with pytest.raises(SystemExit):
            demo(*flags)
        assert "is not empty; give another or --overwrite" in capsys.readouterr().err
    demo("--sampler", tmp_path / "out" / "sampler", "--overwrite")
    with pytest.raises(SystemExit):
        demo("--sampler", tmp_path / "none", "--overwrite")
    (tmp_path / "broken.yaml").write_text("denoiser: nothing\n")
    with pytest.raises(Exception, match="denoiser"):
        demo("--overwrite", recipe=tmp_path / "broken.yaml")
    assert kept.items() <= everything(tmp_path / "out").items()


def test_an_interrupted_demo_goes_on(demo, tmp_path, monkeypatch, caplog):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo.script, "compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo()
    sampler = everything(tmp_path / "out" / "sampler")
    # A sampler that is measured there meanwhile, and another seed, do not go on with it.
    with pytest.raises(SystemExit):
        demo("--sampler", tmp_path / "out" / "sampler")
    with pytest.raises(SystemExit):
        demo("--seed", 1)
    # As `make demo`.
    demo("--overwrite")
    assert "Restored all states from the checkpoint" in caplog.text
    assert everything(tmp_path / "out" / "sampler") == sampler
    assert (tmp_path / "out" / "table.md").is_file()
    assert not (tmp_path / "out" / "unfinished.json").exists()
    caplog.clear()
    demo("--overwrite", "--seed", 1)
    assert "Restored" not in caplog.text
