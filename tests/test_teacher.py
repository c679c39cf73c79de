import types
from dataclasses import replace

import pytest
import rich.progress
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from safetensors.torch import save_file

from ddss_lightning import GGDMSampler, NoiseSchedule, TeacherPairs
from ddss_lightning.denoisers import MixtureDenoiser
from ddss_lightning.images import to_pixels
from ddss_lightning.noise import held_out_noise


@pytest.fixture
def pairs(tmp_path):
    return TeacherPairs(num_pairs=10, num_steps=8, chunk_size=4, cache_dir=str(tmp_path))


def files(pairs, mixture):
    return sorted(path.name for path in pairs.folder(mixture).iterdir())


def double(pairs, mixture, **where):
    return pairs.make(mixture, dtype=torch.float64, **where)


def test_images_are_the_teacher_s_from_the_noise(pairs, mixture):
    double(pairs, mixture)
    indices = [9, 0, 4]
    found = pairs.load(mixture)[indices]
    x_T = pairs.noise(indices, (1, 2, 2))
    sampler = GGDMSampler(mixture.schedule, 8, stride="quadratic")
    with torch.no_grad():
        expected = to_pixels(sampler(mixture, x_T.double()))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert len(pairs.load(mixture)) == 10
    for other in ("train/0", "validation/0", "test/0", "predict/0"):
        assert not torch.isclose(held_out_noise(other, indices, (1, 2, 2), 1)[0], x_T).any()


def test_an_interrupted_run_goes_on_with_what_is_missing(pairs, mixture, monkeypatch, tmp_path):
    made, save = [], save_file

    def interrupted(tensors, path, metadata):
        if len(made) == 1:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        made.append(path)
        save(tensors, path, metadata)

    monkeypatch.setattr("ddss_lightning.teacher.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        double(pairs, mixture)
    assert files(pairs, mixture) == ["00000000-00000004.safetensors"]
    with pytest.raises(ValueError, match=r"'.*00000004-00000008.safetensors' are missing"):
        pairs.load(mixture)
    monkeypatch.setattr("ddss_lightning.teacher.save_file", save)
    names = ["00000004-00000008.safetensors", "00000008-00000010.safetensors"]
    told, track = [], rich.progress.track
    monkeypatch.setattr("rich.progress.track", lambda files, what, **kw: told.append(what) or track(files, what, **kw))
    assert [path.name for path in double(pairs, mixture)] == names
    assert told == ["teacher: 8 calls for each of 6 images"]
    assert double(pairs, mixture) == []
    whole = TeacherPairs(num_pairs=10, num_steps=8, chunk_size=4, cache_dir=str(tmp_path / "whole"))
    double(whole, mixture)
    assert torch.equal(pairs.load(mixture)[range(10)], whole.load(mixture)[range(10)])


def test_processes_share_the_work_and_more_pairs_make_the_new_ones(pairs, mixture, tmp_path):
    shares = [[path.name[:8] for path in double(pairs, mixture, rank=rank, world_size=2)] for rank in (0, 1)]
    assert shares == [["00000000", "00000008"], ["00000004"]]
    more = TeacherPairs(num_pairs=16, num_steps=8, chunk_size=4, cache_dir=str(tmp_path))
    assert [path.name for path in double(more, mixture)] == [
        "00000008-00000012.safetensors", "00000012-00000016.safetensors",
    ]  # fmt: skip
    assert torch.equal(more.load(mixture)[range(10)], pairs.load(mixture)[range(10)])


def test_another_model_or_teacher_has_other_files(pairs, mixture, schedule, tmp_path):
    others = [
        TeacherPairs(num_steps=9, cache_dir=str(tmp_path)),
        TeacherPairs(num_steps=8, anchor="ddim", cache_dir=str(tmp_path)),
        TeacherPairs(num_steps=8, seed=1, cache_dir=str(tmp_path)),
    ]
    folders = {each.folder(mixture) for each in (pairs, *others)}
    folders.add(pairs.folder(MixtureDenoiser(mixture.means + 1, 0.1, schedule)))
    assert len(folders) == 5
    heun = TeacherPairs(num_steps=9, anchor={"class_path": "diffusers.HeunDiscreteScheduler"})
    assert heun.sampler(mixture).coefficients().num_steps == 9


def test_a_learned_sampler_as_teacher_is_known_by_its_numbers(pairs, mixture):
    """Of those of one model the source says no more than that; images of one were taken for those of another."""
    coefficients = pairs.sampler(mixture).coefficients()
    source = {"class_path": "GGDMScheduler of a sampler for a model without a name"}

    def key(nu):
        anchor = {**source, "coefficients": replace(coefficients, nu=nu).to_lists()}
        return replace(pairs, anchor=anchor).key(mixture)

    assert key(coefficients.nu) == key(coefficients.nu.clone()) != key(coefficients.nu + 1e-3)


def test_what_cannot_be_read_is_refused(pairs, mixture):
    double(pairs, mixture)
    path = pairs.folder(mixture) / "00000004-00000008.safetensors"
    save_file({"images": torch.zeros(4, 1, 2, 2, dtype=torch.uint8)}, path, {"denoiser": "another"})
    with pytest.raises(ValueError, match=r"are of {'denoiser': 'another'}, not of .*; delete the file"):
        pairs.load(mixture)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"00000004-00000008.safetensors' are damaged .*; delete the file"):
        pairs.load(mixture)


def test_images_that_are_not_finite_are_not_kept(pairs, mixture, monkeypatch):
    """They were kept, as black ones, for every later fit."""
    whole = mixture.forward
    monkeypatch.setattr(mixture, "forward", lambda x, t: whole(x, t) * float("nan"))
    with pytest.raises(ValueError, match="images that are not finite, of the pairs 0 to "):
        double(pairs, mixture)
    assert not list(pairs.folder(mixture).iterdir())
    monkeypatch.undo()
    assert len(double(pairs, mixture)) == 3


def test_batches_are_permutations_by_seed_and_epoch():
    pairs = TeacherPairs(num_pairs=10)
    epochs = [[index for step in range(start, start + 3) for index in pairs.batch(step, 3, 0)] for start in (0, 3)]
    for epoch in epochs:
        assert len(set(epoch)) == 9
        assert set(epoch) <= set(range(10))
    assert epochs[0] != epochs[1]
    # The order is that of the fit, whatever the pairs.
    assert TeacherPairs(num_pairs=10, seed=1).batch(4, 3, 0) == pairs.batch(4, 3, 0) != pairs.batch(4, 3, 1)
    with pytest.raises(ValueError, match=r"A batch of 11 images.* there are 10; raise num_pairs or lower batch_size"):
        pairs.batch(0, 11, 0)


def test_start_noise_moves_against_the_gradient_and_stays_in_the_ball():
    pairs = TeacherPairs(relax_radius=2.0, relax_step=0.25)
    offsets = torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 1.0], [0.5, 0.0]]).view(4, 1, 1, 2)
    gradients = torch.tensor([[3.0, -4.0], [0.0, -9.0], [0.0, 0.0], [torch.inf, 0.0]]).view(4, 1, 1, 2)
    moved = pairs.moved(offsets, gradients).view(4, 2)
    expected = torch.tensor([[-0.3, 0.4], [0.0, 2.0], [0.0, 1.0], [0.5, 0.0]])
    torch.testing.assert_close(moved, expected)


def test_relaxation_lowers_the_distance_of_a_fixed_sampler(pairs, mixture):
    double(pairs, mixture)
    relaxed = TeacherPairs(**{**vars(pairs), "relax_radius": 0.3, "relax_step": 0.2})
    student, indices = GGDMSampler(mixture.schedule, 3, anchor="ddim"), list(range(10))
    x_T, target = pairs.noise(indices, (1, 2, 2)), pairs.load(mixture)[indices].double()
    offsets, distances = torch.zeros_like(x_T), []
    for _ in range(20):
        start = (x_T + offsets).double().requires_grad_()
        distance = (student(mixture, start) - target).square().flatten(1).mean(1)
        (gradient,) = torch.autograd.grad(distance.sum(), start)
        offsets = relaxed.moved(offsets, gradient)
        distances.append(distance.detach())
        assert offsets.flatten(1).norm(dim=1).max() <= 0.3 * (1 + 1e-6)
    assert distances[-1].mean() < 0.7 * distances[0].mean()


def test_a_teacher_for_times_that_do_not_begin_at_0(pairs, mixture):
    """As those of EDM models, for which the other strides are not made."""
    schedule = NoiseSchedule.from_scheduler(EDMEulerScheduler())
    edm = types.SimpleNamespace(schedule=schedule, prediction_type="edm_epsilon")
    assert pairs.sampler(edm).config["stride"] == "logsnr"
    assert pairs.sampler(mixture).config["stride"] == "quadratic"
    with pytest.raises(ValueError, match=r"stride 'linear' is for timesteps from 0 on, these begin at -1\.554"):
        TeacherPairs(stride="linear").sampler(edm)


def test_bad_arguments(mixture):
    for name in ("num_pairs", "num_steps", "chunk_size"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            TeacherPairs(**{name: 0})
    with pytest.raises(ValueError, match="relax_radius must be a number of at least 0, got -1"):
        TeacherPairs(relax_radius=-1)
    with pytest.raises(ValueError, match="relax_step must be above 0 and at most 1, got 0"):
        TeacherPairs(relax_step=0)
    noisy = {"class_path": "diffusers.DDPMScheduler", "init_args": {"clip_sample": False}}
    with pytest.raises(ValueError, match="must be deterministic, but this anchor adds noise"):
        TeacherPairs(num_steps=5, anchor=noisy).sampler(mixture)


def test_images_are_found_again_on_another_processor(pairs, mixture, schedule):
    """Where diffusers computes `alphas_cumprod` with another last digit; another schedule has other images."""
    alphas_cumprod = schedule.table.mul(2).sigmoid()
    other = torch.where(torch.rand(len(schedule.table)) < 0.5, 1.0, 1 + 2**-23) * alphas_cumprod
    heun = TeacherPairs(num_steps=9, anchor={"class_path": "diffusers.HeunDiscreteScheduler"})
    for each in (pairs, heun):
        near, far = (MixtureDenoiser(mixture.means, mixture.std, NoiseSchedule(table)) for table in (
            other.logit() / 2, NoiseSchedule.from_scheduler(DDPMScheduler(beta_end=0.02002)).table,
        ))  # fmt: skip
        assert each.folder(near) == each.folder(mixture) != each.folder(far)
    # Where the first call is at a log-SNR, and no trained timestep.
    cosine = NoiseSchedule.from_scheduler(DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    shifted = NoiseSchedule(cosine.table * (1 + 2**-23))
    first, second = (MixtureDenoiser(mixture.means, mixture.std, each) for each in (cosine, shifted))
    assert pairs.sampler(first).config["timesteps"] != pairs.sampler(second).config["timesteps"]
    assert pairs.folder(first) == pairs.folder(second)


def test_images_of_a_model_whose_code_has_changed_are_refused(pairs, mixture, monkeypatch):
    double(pairs, mixture)
    forward = MixtureDenoiser.forward
    monkeypatch.setattr(MixtureDenoiser, "forward", lambda self, x, t: forward(self, x, t) * (1 + 1e-6))
    assert double(pairs, mixture) == []
    monkeypatch.setattr(MixtureDenoiser, "forward", lambda self, x, t: forward(self, x, t) * torch.nan)
    with pytest.raises(ValueError, match=r"makes images that are not finite, of the pairs 0 to 3; .* Look for NaN"):
        double(pairs, mixture)
    monkeypatch.setattr(MixtureDenoiser, "forward", lambda self, x, t: forward(self, x, t) * 0.9)
    with pytest.raises(ValueError, match=r"are not those that the model makes now: .* levels on average\. Its code"):
        double(pairs, mixture)
