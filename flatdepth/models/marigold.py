"""Marigold: Stable Diffusion 2 made to denoise depth, in one step or several.

Ke et al. 2024, "Repurposing Diffusion-Based Image Generators for Monocular Depth Estimation". A
frozen autoencoder (VAE) turns pictures, and depth as a grey picture, into latents of an eighth of
the side; a UNet denoises the depth's latent beside that of the image. The modules, schedulers and
the sampling of several steps are those of diffusers; the published folders load, and folders that
its ``MarigoldDepthPipeline`` loads are written.

``forward`` is one step without chance (Martin Garcia et al. 2024, "Fine-Tuning Image-Conditional
Diffusion Models is Easier than You Think"): the UNet at the last time, of a latent of zeros, and
the scheduler's step from there to the end. It is what the losses in pixels train and what is
validated. ``own_loss`` trains the denoiser, and ``sample`` runs it.

Shapes: b batch, h and w pixels, h8 and w8 latent cells.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from flatdepth.augment.rng import Draws
from flatdepth.errors import UserError, expect_within, import_extra
from flatdepth.models.diffusion import (
    STRENGTH,
    affine_depth,
    annealed_noise,
    cell_weight,
    denoising_target,
)
from flatdepth.models.network import DepthNetwork, Supervision, call
from flatdepth.models.pipelines import (
    TEXT_TOKENS,
    WANTED,
    empty_text,
    fits,
    make_scheduler,
    read_part,
    scheduler_text,
    stand_in,
    write_tokens,
)
from flatdepth.untrusted import parse_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """The sizes of one model, as arguments of diffusers' ``UNet2DConditionModel`` (but for
    ``in_channels``) and ``AutoencoderKL``."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]


SIZES = {
    "sd2": Spec(
        unet={
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
            "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
            "out_channels": 4,
        },
        vae={
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "latent_channels": 4,
        },
    ),
    "tiny": Spec(
        unet={
            "block_out_channels": (16, 32),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 8,
            "attention_head_dim": (2, 4),
            "cross_attention_dim": 32,
            "use_linear_projection": True,
            "out_channels": 4,
        },
        vae={
            "block_out_channels": (8, 8, 16, 16),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "latent_channels": 4,
        },
    ),
}
"""Stable Diffusion 2, whose UNet has 866 million parameters, and a random one for tests."""

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
"""That of Marigold 1.1."""

RESOLUTION = 768
"""Longer side in pixels that the published models were trained for."""

STEPS = 4
"""Of Marigold 1.1."""


class Marigold(DepthNetwork):
    """Marigold; ``DepthNetwork`` has its arguments.

    All that trains is the UNet, which is the encoder here: its blocks are those on the way down,
    the middle and those on the way up. The VAE and the embedding of the empty text never train.
    Recomputing the encoder is recomputing the UNet, recomputing the head the VAE's decoder.

    Attributes:
        scheduler: diffusers' ``DDIMScheduler`` or ``LCMScheduler``; only its configuration counts.
        alphas: (t,) share of the signal in the variance, by time.
        gain: where the scheduler gets in its one step from zeros, over what the UNet predicts.
        steps: of denoising, by which the weights predict best.
    """

    name = "marigold"
    title = "Marigold"
    architecture = "Marigold, a UNet and VAE of Stable Diffusion 2 that make depth"
    sizes = SIZES
    encoder_prefix = "unet."
    head_prefix = ()
    stem = ("conv_in.", "time_embedding.")
    unused = ("vae.",)
    adapted = r"unet\..*\.to_(q|k|v|out\.0)"
    layout = "diffusers"
    mean = std = (0.5, 0.5, 0.5)

    unet: Any
    vae: Any
    empty_text: Tensor
    alphas: Tensor

    def build(self, spec: Spec, encoder: bool, head: bool) -> None:
        diffusers = _diffusers()
        self.unet = diffusers.UNet2DConditionModel(in_channels=8, **spec.unet)
        self.vae = diffusers.AutoencoderKL(**spec.vae)
        # Keys and values have no bias: of a text of zeros the attention would learn nothing.
        text = torch.randn(1, TEXT_TOKENS, spec.unet["cross_attention_dim"])
        self.register_buffer("empty_text", text)
        self.register_buffer("alphas", torch.zeros(0), persistent=False)
        self.steps = STEPS
        self._schedule(SCHEDULER)
        if encoder:
            self.unet.enable_gradient_checkpointing(partial(call, recompute=True))
        for layer in self.vae.decoder.modules() if head else ():
            # diffusers' own would recompute a whole resolution at once, in twice the memory.
            if type(layer).__name__ == "ResnetBlock2D":
                layer.forward = partial(_recomputed, layer.forward)

    @property
    def blocks(self) -> nn.ModuleList:
        unet = self.unet
        return nn.ModuleList([*unet.down_blocks, unet.mid_block, *unet.up_blocks])

    @property
    def block_prefixes(self) -> tuple[str, ...]:
        names = {id(module): name for name, module in self.named_modules()}
        return tuple(f"{names[id(block)]}." for block in self.blocks)

    def encode(self, picture: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 4 h8 w8"]:
        """Latents of pictures from -1 to 1: the mode of what the VAE says, scaled."""
        latent: Tensor = self.vae.encode(picture).latent_dist.mode()
        return latent * self.vae.config.scaling_factor

    def denoise(
        self,
        image: Float[Tensor, "b 4 h8 w8"],
        latent: Float[Tensor, "b 4 h8 w8"],
        time: Int[Tensor, " b"],
    ) -> Float[Tensor, "b 4 h8 w8"]:
        """What the UNet predicts, of the scheduler's prediction type."""
        text = self.empty_text.expand(len(latent), -1, -1)
        both = torch.cat((image, latent), dim=1)
        predicted: Tensor
        (predicted,) = self.unet(both, time, encoder_hidden_states=text, return_dict=False)
        return predicted

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Depth from -1, near, to 1, far, or beyond."""
        latent = self.encode(image)
        time = torch.full((len(image),), len(self.alphas) - 1, device=image.device)
        latent = self.gain * self.denoise(latent, torch.zeros_like(latent), time)
        picture: Tensor
        (picture,) = self.vae.decode(latent / self.vae.config.scaling_factor, return_dict=False)
        return picture.mean(1, keepdim=True)

    def decode(self, logits: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
        """Depth from 0, near, to 1, far."""
        return (logits.clamp(-1, 1) + 1) / 2

    def own_loss(self, image: Float[Tensor, "b 3 h w"], truth: Supervision) -> Float[Tensor, " b"]:
        """Squared error of what the UNet predicts of a noisy latent of the truth.

        Averaged over the channels and, by their weights, over the latent cells all of whose pixels
        have truth; 0 for an image without such a cell or without shape. The time is uniform, the
        noise multi-resolution and annealed, both functions of the image's seed.
        """
        depth, has_shape = affine_depth(truth.depth_m, truth.weight)
        weight = cell_weight(truth.weight, self.multiple) * has_shape[:, None, None, None]
        with torch.no_grad():
            condition = self.encode(image)
            clean = self.encode(depth.to(image).expand(-1, 3, -1, -1)).float()
        draws = [Draws(seed) for seed in truth.seeds]
        times = [one.integer("time", len(self.alphas)) for one in draws]
        size = (clean.shape[1], clean.shape[2], clean.shape[3])
        strengths = [STRENGTH * time / len(self.alphas) for time in times]
        fields = [annealed_noise(size, *drawn) for drawn in zip(strengths, draws, strict=True)]
        noise, time = torch.stack(fields).to(clean), torch.tensor(times, device=clean.device)
        alpha = self.alphas[time][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        wanted = denoising_target(self.scheduler.config.prediction_type, clean, noise, alpha)
        error = (self.denoise(condition, noisy, time).float() - wanted).square().mean(1, True)
        total = weight.sum((1, 2, 3))
        return (weight * error).sum((1, 2, 3)) / torch.where(total > 0, total, 1.0)

    @torch.no_grad()
    def sample(
        self,
        image: Float[Tensor, "b 3 h w"],
        *,
        steps: int | None = None,
        ensemble: int = 1,
        seed: int = 0,
    ) -> Float[Tensor, "b 1 h w"]:
        """Depth up to scale and shift, 0 near to 1 far, denoised from noise as diffusers does it.

        Every image is predicted by itself, so it depends on the seed and on nothing else.

        Args:
            image: sRGB in 0..1; of any size if ``steps`` is given.
            steps: of the scheduler, from noise; None: the weights' own number, and what ``forward``
                predicts where that is one step of DDIM, for which weights of one step are made.
            ensemble: predictions that are aligned and of which the median is taken (needs scipy).
            seed: of the noise.

        Raises:
            UserError: the package scipy is missing.
        """
        if steps is None and self.steps == 1 and type(self.scheduler).__name__ == "DDIMScheduler":
            predicted: Tensor = self(image)
            return predicted
        if ensemble > 1:
            import_extra("scipy", "ensemble", "marigold")
        pipeline = self._pipeline(self.scheduler.config.timestep_spacing, None, None)
        pipeline.empty_text_embedding = self.empty_text
        pipeline.set_progress_bar_config(disable=True)
        depths = [
            pipeline(
                one[None],
                num_inference_steps=steps or self.steps,
                ensemble_size=ensemble,
                processing_resolution=0,
                generator=torch.Generator().manual_seed(seed),
                output_type="pt",
            ).prediction
            for one in image
        ]
        return torch.cat(depths).float()

    def _pipeline(self, spacing: str, text_encoder: Any, tokenizer: Any) -> Any:
        """diffusers' pipeline of these very modules, with a scheduler of its own."""
        config = {**self.scheduler.config, "timestep_spacing": spacing}
        return _diffusers().MarigoldDepthPipeline(
            unet=self.unet,
            vae=self.vae,
            scheduler=type(self.scheduler).from_config(config),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            prediction_type="depth",
            scale_invariant=True,
            shift_invariant=True,
            default_denoising_steps=self.steps,
            default_processing_resolution=RESOLUTION,
        )

    def said(self) -> dict[str, str]:
        return {
            "scheduler": scheduler_text(self.scheduler),
            "scaling_factor": str(self.vae.config.scaling_factor),
            "denoising_steps": str(self.steps),
        }

    def adopt(self, said: Mapping[str, str]) -> None:
        try:
            steps = int(said.get("denoising_steps", self.steps))
            scaling = float(said.get("scaling_factor", self.vae.config.scaling_factor))
            config = parse_json(said["scheduler"]) if "scheduler" in said else None
        except ValueError as error:
            raise UserError(f"the metadata of the weights are damaged ({error})") from error
        if not 0 < scaling < math.inf:
            raise UserError(f"scaling_factor: expected a number above 0, got {scaling}")
        expect_within("denoising_steps", steps, 1, 1000)
        if "scheduler" in said:
            self._schedule(config)
        self.steps = steps
        self.vae.register_to_config(scaling_factor=scaling)

    def _schedule(self, config: object) -> None:
        """Take a scheduler by its configuration, and what follows from it."""
        scheduler, gain = make_scheduler(config)
        self.scheduler, self.gain = scheduler, gain
        self.alphas = torch.tensor(scheduler.alphas_cumprod.tolist(), device=self.alphas.device)

    def begin_training(self, own_loss: bool) -> None:
        """Losses in pixels make weights of one step, the denoiser's loss weights of several."""
        if not own_loss:
            self.steps = 1
        elif self.steps == 1:
            self.steps = STEPS

    def write_layout(self, folder: Path) -> None:
        """A pipeline with trailing times, because only so its single step begins at the last one.

        The text encoder is a stand-in that knows the empty text only, for no other is ever asked.
        """
        pipeline = self._pipeline("trailing", *stand_in(self.empty_text))
        pipeline.save_pretrained(folder)
        # Versions of transformers before 5 read these in place of tokenizer.json.
        write_tokens(folder / "tokenizer")

    @classmethod
    def configured(cls, config: Mapping[str, object], source: str) -> Mapping[str, str] | None:
        found = config.get("_class_name")
        if found not in ("MarigoldDepthPipeline", "MarigoldPipeline", "StableDiffusionPipeline"):
            return None
        if config.get("prediction_type", "depth") != "depth":
            raise UserError(
                f"{source}: expected the prediction_type depth, found "
                f"{config['prediction_type']!r}; take another model"
            )
        folder = Path(source).parent
        unet, vae = (read_part(folder / part / "config.json") for part in ("unet", "vae"))
        sizes = [
            name
            for name, spec in SIZES.items()
            if fits(unet, spec.unet) and fits(vae, spec.vae) and unet.get("in_channels") in (4, 8)
        ]
        if not sizes:
            raise UserError(
                f"{source}: expected the UNet and VAE of Stable Diffusion 2, found others; take "
                "another model"
            )
        scheduler, _ = make_scheduler(read_part(folder / "scheduler" / "scheduler_config.json"))
        return {
            "encoder": sizes[0],
            "kind": "affine",
            "scheduler": scheduler_text(scheduler),
            "scaling_factor": str(vae.get("scaling_factor", 0.18215)),
            "denoising_steps": str(config.get("default_denoising_steps") or STEPS),
        }

    @classmethod
    def assembled(cls, folder: Path) -> tuple[dict[str, Tensor], list[str]]:
        diffusers, notes = _diffusers(), ["joined the pipeline's components"]
        tensors = {"empty_text": empty_text(folder)}
        for part, kind in (("unet", "UNet2DConditionModel"), ("vae", "AutoencoderKL")):
            module = getattr(diffusers, kind).from_pretrained(
                folder, subfolder=part, local_files_only=True
            )
            tensors |= {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}
        first = tensors["unet.conv_in.weight"]
        if first.shape[1] == 4:
            tensors["unet.conv_in.weight"] = torch.cat((first, first), dim=1) / 2
            notes.append("gave the first layer of Stable Diffusion the channels of a second latent")
        return tensors, notes

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
        return (dict(tensors), []) if "unet.conv_in.weight" in tensors else None

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> str | None:
        first = tensors.get("unet.conv_in.weight")
        widths = {spec.unet["block_out_channels"][0]: name for name, spec in SIZES.items()}
        return None if first is None or first.ndim == 0 else widths.get(first.shape[0])

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        if encoder != "sd2":
            return None
        return (
            "openrail++",
            "Stable Diffusion 2 and the Marigold models made from it are CreativeML Open RAIL++-M, "
            "whose restrictions of use have to be passed on with weights derived from them.",
        )


def _recomputed(forward: Callable[..., Tensor], x: Tensor, temb: Tensor | None = None) -> Tensor:
    """A layer of the VAE, called as diffusers calls it."""
    return call(forward, x, temb, recompute=True)


def _diffusers() -> Any:
    return import_extra("diffusers", *WANTED)
