"""Marigold against diffusers' own pipeline, its loss against its formulas, training, files."""

import json
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from flatdepth.augment.rng import Draws
from flatdepth.bench import crash
from flatdepth.cli import parse_config
from flatdepth.commands import checkpoint as checkpoint_command
from flatdepth.config import LossConfig, ModelConfig, OptimConfig, TrainConfig
from flatdepth.errors import UserError
from flatdepth.models import checkpoint
from flatdepth.models.checkpoint import open_model, read_weights, save_weights
from flatdepth.models.diffusion import affine_depth, annealed_noise, cell_weight, denoising_target
from flatdepth.models.export import export_weights
from flatdepth.models.lora import add_lora, merged
from flatdepth.models.marigold import SCHEDULER, SIZES, Marigold
from flatdepth.models.network import Supervision, freeze, parameter_groups
from flatdepth.training import memory, runlog
from flatdepth.training.loop import train
from flatdepth.training.losses import depth_loss, own_arguments
from flatdepth.training.optim import make_optimizer
from tests import step_probe
from tests.conftest import REPOSITORY, TinySets
from tests.test_memory import module_types

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

IMAGE = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
SCHEDULERS: dict[str, dict[str, Any]] = {
    "v, zero SNR": {},
    "v": {"rescale_betas_zero_snr": False},
    "v, leading": {"rescale_betas_zero_snr": False, "timestep_spacing": "leading"},
    "v, ends at one": {"set_alpha_to_one": True},
    "noise": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False},
    "sample": {"prediction_type": "sample"},
    "LCM": {"_class_name": "LCMScheduler", "rescale_betas_zero_snr": False},
}

Make = Callable[..., Path]


def network(**changes: Any) -> Marigold:
    torch.manual_seed(0)
    return Marigold("tiny", kind="affine", **changes).eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the folder of a pipeline with random weights and a text encoder, as diffusers does."""
    folder = tmp_path_factory.mktemp("published")

    def make(name: str, *, unet: Any = (), pipeline: str = "", **scheduler: Any) -> Path:
        target = folder / name.replace(" ", "_")
        if target.exists():
            return target
        torch.manual_seed(7)
        parts = {
            "unet": diffusers.UNet2DConditionModel(
                **{"in_channels": 8, **SIZES["tiny"].unet, **dict(unet)}
            ),
            "vae": diffusers.AutoencoderKL(**SIZES["tiny"].vae, scaling_factor=0.2),
            "text_encoder": transformers.CLIPTextModel(
                transformers.CLIPTextConfig(
                    hidden_size=32, intermediate_size=37, num_attention_heads=4,
                    num_hidden_layers=2, vocab_size=1000, bos_token_id=0, eos_token_id=2,
                    pad_token_id=1,
                )
            ),
        }  # fmt: skip
        settings = SCHEDULER | scheduler
        parts["scheduler"] = getattr(diffusers, settings.pop("_class_name"))(**settings)
        words = folder / "words"
        words.mkdir(exist_ok=True)
        (words / "vocab.json").write_text('{"<|startoftext|>":0,"<|endoftext|>":1,"a</w>":2}')
        (words / "merges.txt").write_text("#version: 0.2\n")
        parts["tokenizer"] = transformers.CLIPTokenizer.from_pretrained(words, model_max_length=77)
        whole = diffusers.MarigoldDepthPipeline(**parts, prediction_type="depth")
        whole.save_pretrained(target)
        if pipeline:
            index = json.loads((target / "model_index.json").read_text())
            (target / "model_index.json").write_text(json.dumps(index | json.loads(pipeline)))
        return target

    return make


def reference(folder: Path) -> Any:
    pipeline = diffusers.MarigoldDepthPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def one_step(pipeline: Any, image: Tensor) -> Tensor:
    size = (len(image), 4, image.shape[2] // 8, image.shape[3] // 8)
    return pipeline(
        image, num_inference_steps=1, processing_resolution=0, latents=torch.zeros(size),
        output_type="pt", batch_size=len(image),
    ).prediction  # fmt: skip


def supervision(seeds: tuple[int, ...] = (3, 4)) -> Supervision:
    generator = torch.Generator().manual_seed(1)
    depth_m = 1 + 4 * torch.rand(len(seeds), 1, 64, 96, generator=generator)
    weight = torch.ones_like(depth_m)
    weight[:, :, 5:30, 40:70] = 0
    weight[0, :, 40:] = 3
    return Supervision(torch.where(weight > 0, depth_m, torch.nan), weight, seeds)


# What it is.


def test_it_has_the_sizes_of_stable_diffusion_2_and_says_what_it_predicts() -> None:
    with torch.device("meta"):
        large = Marigold("sd2", kind="affine")
    # 865,910,724 with the four channels of Stable Diffusion, 320 filters of 3 x 3 for four more
    counts = [sum(p.numel() for p in part.parameters()) for part in (large.unet, large.vae)]
    assert counts == [865_910_724 + 320 * 4 * 9, 83_653_863]
    assert large.empty_text.shape == (1, 2, 1024)
    for spec in SIZES.values():
        assert 2 ** (len(spec.vae["block_out_channels"]) - 1) == large.multiple == 8
    assert (large.kind, large.units) == ("affine", "depth")
    with pytest.raises(UserError, match="marigold predicts affine depth, found 'metric'"):
        Marigold("tiny", kind="metric")
    with pytest.raises(ValueError, match="multiples of 8"):
        network()(torch.rand(1, 3, 64, 92))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_published_folder_predicts_in_one_step_what_the_pipeline_does(
    published: Make, name: str
) -> None:
    folder = published(name, **SCHEDULERS[name])
    model, report = open_model(str(folder))
    assert report.matched == report.total and "joined the pipeline's components" in str(report)
    pipeline = reference(folder)
    # With leading times the pipeline's only step would be the one before the end.
    spacing = {**pipeline.scheduler.config, "timestep_spacing": "trailing"}
    pipeline.scheduler = type(pipeline.scheduler).from_config(spacing)
    with torch.no_grad():
        found, wanted = model(IMAGE), one_step(pipeline, IMAGE)
    assert wanted.std() > 0.01 and torch.equal(model.empty_text, pipeline.empty_text_embedding)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_one_step_is_minus_v_of_a_scheduler_without_signal_at_the_last_time(
    published: Make,
) -> None:
    model, _ = open_model(str(published("v, ends at one", set_alpha_to_one=True)))
    with torch.no_grad():
        picture = 2 * IMAGE - 1
        latent = model.vae.encode(picture).latent_dist.mean * 0.2
        both = torch.cat((latent, torch.zeros_like(latent)), 1)
        text = model.empty_text.repeat(2, 1, 1)
        v = model.unet(both, 999, encoder_hidden_states=text).sample
        wanted = (model.vae.decode(-v / 0.2).sample.mean(1, keepdim=True).clip(-1, 1) + 1) / 2
        torch.testing.assert_close(model(IMAGE), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["v, zero SNR", "v, leading", "noise", "LCM"])
def test_several_steps_and_an_ensemble_are_those_of_the_pipeline(
    published: Make, name: str
) -> None:
    pytest.importorskip("scipy")
    folder = published(name, **SCHEDULERS[name])
    model, _ = open_model(str(folder))
    image = IMAGE[..., :60, :]  # padded to a multiple of 8 on the way
    found = model.sample(image, steps=4, ensemble=3, seed=11)
    pipeline = reference(folder)
    for one, own in zip(image, found, strict=True):
        wanted = pipeline(
            one[None], num_inference_steps=4, ensemble_size=3, processing_resolution=0,
            generator=torch.Generator().manual_seed(11), output_type="pt",
        ).prediction[0]  # fmt: skip
        torch.testing.assert_close(own, wanted, rtol=0, atol=1e-5)
    single = model.sample(image, steps=2, seed=11)
    assert torch.equal(single[1:], model.sample(image[1:], steps=2, seed=11))
    assert not torch.equal(single, model.sample(image, steps=2, seed=12))


def test_weights_say_by_how_many_steps_they_predict(published: Make, tmp_path: Path) -> None:
    folder = published("v, zero SNR")
    model, _ = open_model(spoil(folder, tmp_path, "model_index.json", default_denoising_steps=3))
    assert torch.equal(model.sample(IMAGE), model.sample(IMAGE, steps=3))
    single, _ = open_model(spoil(folder, tmp_path, "model_index.json", default_denoising_steps=1))
    with torch.no_grad():
        assert torch.equal(single.sample(IMAGE), single(IMAGE))
    assert not torch.allclose(single.sample(IMAGE, steps=1), single.sample(IMAGE))
    for own_loss, before, after in ((False, model, 1), (True, single, 4)):
        before.begin_training(own_loss)
        assert before.said()["denoising_steps"] == str(after)
    export_weights(model, tmp_path / "one")
    assert reference(tmp_path / "one").default_denoising_steps == 1
    distilled, _ = open_model(str(published("LCM", **SCHEDULERS["LCM"])))
    distilled.adopt({"denoising_steps": "1"})
    assert torch.equal(distilled.sample(IMAGE), distilled.sample(IMAGE, steps=1))


def test_stable_diffusion_itself_gets_the_channels_of_a_second_latent(published: Make) -> None:
    folder = published(
        "plain", unet={"in_channels": 4}, pipeline='{"_class_name": "StableDiffusionPipeline"}'
    )
    model, report = open_model(str(folder))
    assert "the channels of a second latent" in str(report)
    plain = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    latent, time = torch.randn(1, 4, 8, 12), torch.tensor([500])
    with torch.no_grad():
        found = model.denoise(latent, latent, time)
        wanted = plain(latent, time, encoder_hidden_states=model.empty_text).sample
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


# Files.


def test_our_own_file_is_whole_and_comes_back_bit_for_bit(published: Make, tmp_path: Path) -> None:
    folder = published("noise", **SCHEDULERS["noise"])
    model, _ = open_model(str(folder))
    for path in save_weights(model, tmp_path / "own"):
        again, report = open_model(str(path))
        assert isinstance(again, Marigold) and again.said() == model.said()
        assert again.scheduler.config.prediction_type == "epsilon"
        assert again.vae.config.scaling_factor == 0.2 and "loaded 389 of 389" in str(report)
        with torch.no_grad():
            assert torch.equal(again(IMAGE), model(IMAGE))
            assert torch.equal(again.sample(IMAGE, steps=2), model.sample(IMAGE, steps=2))
    assert model.like().said() == model.said() != network().said()


@pytest.mark.parametrize("name", ["v, zero SNR", "v, leading"])
def test_an_exported_folder_is_one_that_the_pipeline_loads(
    published: Make, name: str, tmp_path: Path
) -> None:
    model, _ = open_model(str(published(name, **SCHEDULERS[name])))
    assert export_weights(model, tmp_path / "out") < 1e-5
    pipeline = reference(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(one_step(pipeline, IMAGE), model(IMAGE), rtol=0, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "MarigoldDepthPipeline" in card and "known up to scale and shift" in card
    with pytest.raises(UserError, match="would be overwritten"):
        export_weights(model, tmp_path / "out")


def test_the_command_verifies_every_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, safe = save_weights(network(), tmp_path / "own")
    assert checkpoint_command.main(["verify", str(safe)]) == 0
    said = capsys.readouterr().out
    assert said.count("\nequal to") == 3 and "equal to diffusers layout" in said
    checkpoint_command.main(["info", str(safe)])
    assert "kind         affine (by its metadata)" in capsys.readouterr().out


def test_a_hub_id_is_fetched_whole(published: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = published("v, zero SNR")
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.*"))
    hub = checkpoint.huggingface_hub
    monkeypatch.setattr(hub, "list_repo_files", lambda _: [*files, "768-v-ema.ckpt"])

    def snapshot(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo == "org/marigold"
        chosen = [p for p in files if any(Path(p).match(pattern) for pattern in allow_patterns)]
        assert {Path(p).parts[0] for p in chosen} >= {"unet", "vae", "text_encoder", "tokenizer"}
        assert not any(Path(p).match(pattern) for p in chosen for pattern in ignore_patterns)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    model, _ = open_model("org/marigold")
    assert torch.equal(model(IMAGE), open_model(str(folder))[0](IMAGE))


def spoil(folder: Path, tmp_path: Path, file: str, **changes: object) -> str:
    copy = tmp_path / f"spoilt{len(list(tmp_path.iterdir()))}"
    shutil.copytree(folder, copy)
    content = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(content | changes))
    return str(copy)


def test_what_is_no_such_model_is_refused_in_a_sentence(published: Make, tmp_path: Path) -> None:
    folder = published("v, zero SNR")
    scheduler, index = "scheduler/scheduler_config.json", "model_index.json"
    for file, changes, message in (
        (index, {"_class_name": "MarigoldNormalsPipeline"}, "pipeline of diffusers that predicts"),
        (index, {"prediction_type": "disparity"}, "expected the prediction_type depth, found 'dis"),
        ("unet/config.json", {"cross_attention_dim": 768}, "UNet and VAE of Stable Diffusion 2"),
        (scheduler, {"clip_sample": True}, "clip_sample and thresholding: expected false"),
        (scheduler, {"prediction_type": "epsilon"}, "cannot begin where there is nothing"),
        (scheduler, {"beta_schedule": "steep"}, "diffusers does not take .*steep"),
        (scheduler, {"num_train_timesteps": 10**9}, "expected 2 to 100000"),
    ):
        with pytest.raises(UserError, match=message):
            open_model(spoil(folder, tmp_path, file, **changes))
    for part, message in (
        ("tokenizer", "holds no tokenizer; fetch"),
        ("vae", "vae/config.json cannot be read"),
        ("unet/diffusion_pytorch_model.safetensors", "cannot be read"),
    ):
        copy = Path(spoil(folder, tmp_path, index))
        shutil.rmtree(copy / part) if (copy / part).is_dir() else (copy / part).unlink()
        with pytest.raises(UserError, match=message):
            open_model(str(copy))
    assert read_weights(str(folder)).encoder == "tiny"


def test_metadata_that_cannot_be_leave_the_network_as_it_was() -> None:
    model = network()
    before = model.said()
    for said in (
        {"scheduler": "{"},
        {"scheduler": "[]"},
        {"scaling_factor": "nan"},
        {"scaling_factor": "x"},
        {"scheduler": json.dumps(SCHEDULER | {"beta_start": "x"})},
    ):
        with pytest.raises(UserError):
            model.adopt(said)
        assert model.said() == before


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"model\.name: marigold needs the package diffusers .*"):
        network()


# The latent loss, part by part.


def test_depth_is_normalised_by_the_quantiles_of_the_known_pixels() -> None:
    truth = supervision()
    depth, has_shape = affine_depth(truth.depth_m, truth.weight)
    assert has_shape.tolist() == [True, True]
    for z, known, own in zip(truth.depth_m, truth.weight > 0, depth, strict=True):
        near, far = np.quantile(z[known].double().numpy(), (0.02, 0.98))
        wanted = ((z.double() - near) / (far - near) * 2 - 1).clamp(-1, 1)
        torch.testing.assert_close(own[known].double(), wanted[known], rtol=0, atol=1e-5)
        assert own[~known].eq(1).all() and own.min() == -1
    flat = torch.full((3, 1, 16, 16), 4.0)
    flat[0] += 1e-3 * torch.rand(1, 16, 16)  # the rounding of half precision
    weight = torch.ones_like(flat)
    weight[2] = 0
    depth, has_shape = affine_depth(flat, weight)
    assert not has_shape.any() and depth.eq(1).all()


def test_a_cell_counts_if_all_its_pixels_are_known() -> None:
    weight = torch.ones(1, 1, 16, 24)
    weight[..., 3, 9] = 0
    weight[..., 8:, 16:] = 2
    weight[..., 8:, 16:20] = 4
    assert cell_weight(weight, 8).tolist() == [[[[1, 0, 1], [1, 1, 3]]]]


def published_noise(rng: np.random.Generator, size: tuple[int, int], strength: float) -> np.ndarray:
    """The rule of the published code, written down again with numbers of another source."""
    rows, columns = size
    noise = rng.standard_normal((4, *size))
    for octave in range(10):
        zoom = (2 + 2 * rng.random()) ** octave
        rows, columns = max(1, int(rows / zoom)), max(1, int(columns / zoom))
        coarse = torch.from_numpy(rng.standard_normal((1, 4, rows, columns)))
        noise += strength**octave * F.interpolate(coarse, size, mode="bilinear")[0].numpy()
        if 1 in (rows, columns):
            break
    return noise / noise.std(ddof=1)


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.9])
def test_the_noise_has_the_law_of_the_published_rule(strength: float) -> None:
    """Unit variance over each image, and in means over 4 x 4 cells what the rule has there."""
    size, count = (16, 24), 400
    own = torch.stack([annealed_noise((4, *size), strength, Draws(seed)) for seed in range(count)])
    torch.testing.assert_close(own.flatten(1).std(1), torch.ones(count))
    rng = np.random.default_rng(0)
    theirs = torch.from_numpy(
        np.stack([published_noise(rng, size, strength) for _ in range(count)])
    )
    blocks = [F.avg_pool2d(noise.double(), 4).var().item() for noise in (own, theirs)]
    assert blocks[0] == pytest.approx(blocks[1], rel=0.08)
    if strength == 0:
        assert blocks[0] == pytest.approx(1 / 16, rel=0.05)
    else:
        assert blocks[0] > 1.5 / 16


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon", "sample"])
def test_targets_are_those_of_the_scheduler(kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type=kind)
    clean, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    time = torch.tensor([0, 400, 999])
    alpha = scheduler.alphas_cumprod[time][:, None, None, None]
    wanted = {
        "v_prediction": scheduler.get_velocity(clean, noise, time),
        "epsilon": noise,
        "sample": clean,
    }
    torch.testing.assert_close(denoising_target(kind, clean, noise, alpha), wanted[kind])


@pytest.mark.parametrize("name", ["v, zero SNR", "noise"])
def test_the_loss_is_the_error_over_whole_cells(published: Make, name: str) -> None:
    """Put together again from the scheduler of diffusers and the bare modules."""
    model, _ = open_model(str(published(name, **SCHEDULERS[name])))
    truth = supervision()
    with torch.no_grad():
        found = model(IMAGE, None, truth)
        depth, _ = affine_depth(truth.depth_m, truth.weight)
        for index, seed in enumerate(truth.seeds):
            time = Draws(seed).integer("time", 1000)
            noise = annealed_noise((4, 8, 12), 0.9 * time / 1000, Draws(seed))[None]
            one = slice(index, index + 1)
            image, clean = (
                0.2 * model.vae.encode(x).latent_dist.mean
                for x in (2 * IMAGE[one] - 1, depth[one].repeat(1, 3, 1, 1))
            )
            when = torch.tensor([time])
            noisy = model.scheduler.add_noise(clean, noise, when)
            said = model.unet(
                torch.cat((image, noisy), 1), when, encoder_hidden_states=model.empty_text
            ).sample
            wanted = noise
            if name != "noise":
                wanted = model.scheduler.get_velocity(clean, noise, when)
            known = truth.weight[index, 0].reshape(8, 8, 12, 8) > 0
            whole = known.all(3).all(1)
            cells = truth.weight[index, 0].reshape(8, 8, 12, 8).mean((1, 3)) * whole
            error = ((said - wanted) ** 2).mean((0, 1))
            assert 0 < whole.sum() < whole.numel()
            expected = (cells * error).sum() / cells.sum()
            torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-6)


def test_images_without_truth_or_shape_have_no_loss_and_no_gradient() -> None:
    model, truth = network(), supervision()
    truth.weight[0] = 0
    truth.depth_m[1] = 3.0
    losses = model(IMAGE, None, truth)
    assert losses.tolist() == [0, 0]
    losses.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_the_loss_of_an_image_is_its_own() -> None:
    """Whatever is beside it, and other for another seed."""
    model, truth = network(), supervision()
    both = model(IMAGE, None, truth)
    for index, seed in enumerate(truth.seeds):
        one = slice(index, index + 1)
        alone = Supervision(truth.depth_m[one], truth.weight[one], (seed,))
        torch.testing.assert_close(model(IMAGE[one], None, alone)[0], both[index])
    assert torch.equal(model(IMAGE, None, truth), both)
    other = model(IMAGE, None, replace(truth, seeds=(5, 4)))
    assert not torch.isclose(other[0], both[0]) and torch.isclose(other[1], both[1])


# The network in training.


def outcome(model: Marigold, own: bool) -> Tensor:
    truth = supervision()
    if own:
        return model(IMAGE, None, truth)
    return depth_loss("affine", model(IMAGE), truth.depth_m, truth.weight)


@pytest.mark.parametrize("own", [False, True], ids=["pixels", "latents"])
def test_gradients_reach_the_unet_alone_and_recomputing_changes_none(own: bool) -> None:
    found = []
    for checkpointing in ("none", "encoder", "encoder+head"):
        model = network(checkpointing=checkpointing).train()
        outcome(model, own).mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == {f"unet.{name}" for name, _ in network().unet.named_parameters()}
    assert all(gradient.any() for gradient in found[0].values())
    for other in found[1:]:
        assert all(torch.equal(gradient, other[name]) for name, gradient in found[0].items())


def test_a_batch_is_its_images_one_by_one() -> None:
    model = network()
    with torch.no_grad():
        alone = torch.cat([model(one[None]) for one in IMAGE])
        torch.testing.assert_close(model(IMAGE), alone, rtol=0, atol=1e-5)


def test_parts_freeze_and_what_trains_is_in_one_group() -> None:
    model = network()
    groups = {g["name"]: g["params"] for g in parameter_groups(model, 1e-4, 10.0, 0.01)}
    assert groups.keys() == {"encoder", "encoder no decay"}
    trained = [p for members in groups.values() for p in members]  # type: ignore[attr-defined]
    assert {*map(id, trained)} == {*map(id, model.unet.parameters())}
    freeze(model, "none", 3)
    left = {name for name, p in model.named_parameters() if p.requires_grad}
    assert left == {
        f"unet.{name}"
        for name, _ in model.unet.named_parameters()
        if name.startswith(("up_blocks.", "conv_norm_out.", "conv_out."))
    }
    freeze(model, "none", len(model.blocks))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"unet.{layer}.{leaf}"
        for layer in ("conv_norm_out", "conv_out")
        for leaf in ("weight", "bias")
    }
    freeze(model, "encoder")
    with pytest.raises(UserError, match=r"leave nothing of marigold to train; freeze less"):
        make_optimizer(model, OptimConfig(), torch.device("cpu"))


def test_adapters_start_from_the_model_and_are_merged_back() -> None:
    pytest.importorskip("peft")
    model = network()
    with torch.no_grad():
        before = model(IMAGE)
        add_lora(model, rank=2, alpha=4.0)
        torch.testing.assert_close(model(IMAGE), before, rtol=0, atol=1e-5)
    outcome(model, True).mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    attentions = [name for name, _ in model.named_modules() if name.endswith((".attn1", ".attn2"))]
    assert len(trained) == len(attentions) * 4 * 2 > 0 and all("lora" in name for name in trained)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
        plain = merged(model).eval()
        assert plain.state_dict().keys() == network().state_dict().keys()
        assert (model(IMAGE) - before).abs().max() > 1e-3
        torch.testing.assert_close(plain(IMAGE), model(IMAGE), rtol=0, atol=1e-5)


def test_the_latent_loss_is_marigolds_alone() -> None:
    diffusion, affine = LossConfig(terms={"diffusion": 2.0}), ModelConfig(kind="relative")
    with pytest.raises(UserError, match=r"diffusion is a loss of marigold alone, got model\.name"):
        TrainConfig(loss=diffusion, model=affine)
    with pytest.raises(
        UserError, match=r"cannot be added to others, got diffusion, affine; give it"
    ):
        LossConfig(terms={"diffusion": 1.0, "affine": 1.0})
    with pytest.raises(UserError, match=r"expected one of 'silog', .* 'diffusion', got 'mse'"):
        LossConfig(terms={"mse": 1.0})
    truth = supervision()
    given = own_arguments(diffusion, truth.depth_m, truth.weight, [3, 4])
    assert len(given) == 1 and given[0].seeds == (3, 4)
    assert own_arguments(LossConfig(), truth.depth_m, truth.weight, [3, 4]) == ()
    losses = network()(IMAGE, None, *given)
    assert torch.equal(
        depth_loss("affine", losses, truth.depth_m, truth.weight, diffusion), 2 * losses
    )


@pytest.mark.parametrize("own", [False, True], ids=["pixels", "latents"])
def test_one_batch_can_be_learned(own: bool) -> None:
    model = network().train()
    v, u = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 96), indexing="ij")
    depth_m = torch.stack((1 + 3 * u, 2 + u + v))[:, None]
    truth = Supervision(depth_m, torch.ones_like(depth_m), (3, 4))
    optimizer = torch.optim.Adam(model.unet.parameters(), lr=2e-3)
    values = []
    for _ in range(30):
        loss = model(IMAGE, None, truth) if own else depth_loss(
            "affine", model(IMAGE), depth_m, truth.weight
        )  # fmt: skip
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        values.append(float(loss.detach().mean()))
    assert values[-1] < 0.6 * values[0]


@pytest.mark.parametrize("name", ["marigold", "marigold_e2e"])
def test_its_config_says_what_it_needs(name: str) -> None:
    header = (REPOSITORY / "configs" / f"{name}.yaml").read_text().split("\nname:")[0]
    for part in ("'.[marigold]'", f"configs/{name}.yaml", "Hardware:", "memory:", "RAIL++-M"):
        assert part in header


def shrunk(name: str, sets: TinySets, folder: Path, *more: str) -> TrainConfig:
    """A ready config with the tiny network on tiny rooms."""
    return parse_config(
        TrainConfig,
        [
            f"--config={REPOSITORY / 'configs' / name}.yaml",
            *(f"--runs={folder / 'runs'}", "--name=tiny", "--steps=4", "--batch=4"),
            *("--micro_batch=2", "--precision=no", "--save_every=2", "--log_every=1"),
            *("--tracker=none", f"--data.train=[{{path: {sets.rooms}}}]", "--data.height=64"),
            *(f"--data.art=[{sets.pictures}]", "--data.width=80", "--data.threads=2"),
            *("--model.encoder=tiny", "--model.checkpoint=null", "--optim.warmup=1"),
            *("--eval.every=4", "--eval.images=2", "--eval.pictures=0", *more),
        ],
        prog="train.py",
        description=None,
    )


def fresh_accelerator() -> None:
    """As between processes: accelerate keeps its state in the process."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)


def train_on_ranks(config: TrainConfig, ranks: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    processes = [
        crash.CONTEXT.Process(target=step_probe.train_rank, args=(config, rank, ranks, port))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "write_report", lambda _: None)


@pytest.mark.usefixtures("without_reports")
@pytest.mark.parametrize("name", ["marigold", "marigold_e2e"])
def test_a_stopped_run_goes_on_bit_for_bit(name: str, tiny_sets: TinySets, tmp_path: Path) -> None:
    config = shrunk(name, tiny_sets, tmp_path)
    assert train(config)["finished"]
    run = tmp_path / "runs" / "tiny"
    whole = crash.fingerprint(run)
    assert len({line["loss"] for line in whole["history"]}) == 4
    moved = open_model(str(run / "weights" / "final.safetensors"))[0]
    assert moved.said()["denoising_steps"] == ("1" if name == "marigold_e2e" else "4")
    torch.manual_seed(config.seed)
    fresh = Marigold("tiny", kind="affine").state_dict()
    changed = {key for key, t in moved.state_dict().items() if not torch.equal(t, fresh[key])}
    assert changed == {key for key in fresh if key.startswith("unet.")}
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    shutil.rmtree(run / "weights")
    fresh_accelerator()
    assert train(config)["finished"]
    assert crash.fingerprint(run) == whole


@pytest.mark.usefixtures("without_reports")
def test_noise_does_not_depend_on_how_a_step_is_split(tiny_sets: TinySets, tmp_path: Path) -> None:
    """Two processes, whose wrapper exchanges gradients in the loss's pass, and smaller batches."""
    runs = {}
    for label, ranks, micro_batch in (("one", 1, 2), ("single", 1, 1), ("two", 2, 2)):
        config = shrunk(
            *("marigold", tiny_sets, tmp_path / label, f"--micro_batch={micro_batch}"),
            *("--steps=3", "--optim.lr=1e-2", "--optim.schedule=constant"),
        )
        (tmp_path / label).mkdir()
        if ranks == 1:
            train(config)
            fresh_accelerator()
        else:
            train_on_ranks(config, ranks)
        run = tmp_path / label / "runs" / "tiny"
        runs[label] = [line["loss"] for line in crash.fingerprint(run)["history"]]
    for label in ("single", "two"):
        assert runs[label] == pytest.approx(runs["one"], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own", [False, True], ids=["pixels", "latents"])
def test_simulated_types_are_those_of_cuda(dtype: torch.dtype, own: bool) -> None:
    def given() -> tuple[object, ...]:
        truth = torch.ones(1, 1, 64, 64)
        supervision = (Supervision(truth, truth, (0,)),) if own else ()
        return (torch.empty(1, 3, 64, 64), None, *supervision)

    make = partial(Marigold, "tiny", kind="affine")
    on_cuda = module_types(make, given, "cuda", dtype)
    with memory.cuda_autocast():
        simulated = module_types(make, given, "cpu", dtype)
    assert len(on_cuda) > 100 and any(dtype in found for _, found in on_cuda)
    assert simulated == on_cuda


@pytest.mark.parametrize("terms", [{"affine": 1.0}, {"diffusion": 1.0}])
def test_the_memory_of_a_step_can_be_simulated(terms: Any) -> None:
    """In half precision, where recomputed activations must be of the types that they were."""
    config = TrainConfig(
        batch=2,
        precision="fp16",
        data=replace(TrainConfig().data, height=64, width=64),
        model=ModelConfig(
            name="marigold", encoder="tiny", kind="affine", checkpointing="encoder+head"
        ),
        loss=LossConfig(terms=terms),
    )
    parts = memory.simulate(config).peak.parts
    model = network()
    frozen, trained = (sum(p.nbytes for p in part.parameters()) for part in (model.vae, model.unet))
    blocks = memory.BLOCK * len([*model.parameters(), *model.buffers()])
    assert 0 <= parts["weights"] - frozen - trained < blocks + 16_000
    assert 0 <= parts["gradients"] - trained < blocks
    assert 0 <= parts["optimiser state"] - 2 * trained < 3 * blocks
