"""Depth Anything V2: a DINOv2 vision transformer with a DPT head, metric or relative.

Written from the papers (Oquab et al. 2023, "DINOv2"; Ranftl et al. 2021, "Vision Transformers for
Dense Prediction"; Yang et al. 2024, "Depth Anything V2") and from the key names and shapes of the
official checkpoints, which load here with ``strict=True`` and ours there.

Shapes: b batch, n tokens, d embedding width, h and w pixels, rows and cols patches of 14 pixels.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from flatdepth.errors import UserError
from flatdepth.models.network import DepthNetwork, call

PATCH = 14
"""Side in pixels of what becomes a token."""

GRID = 37
"""Patches along each side of the position embedding: training pictures were 518 pixels wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """The sizes of one model.

    Attributes:
        embed_dim: width of a token.
        depth: number of transformer blocks.
        heads: attention heads per block.
        taken: the four blocks, counted from 0, whose output the head reads, shallow to deep.
        features: channels of the head's fusion path.
        out_channels: channels of the head's four levels before fusion, fine to coarse.
        swiglu: gated feed-forward layers (DINOv2 giant) in place of the two-layer perceptron.
    """

    embed_dim: int
    depth: int
    heads: int
    taken: tuple[int, int, int, int]
    features: int
    out_channels: tuple[int, int, int, int]
    swiglu: bool = False


ENCODERS = {
    "vitt": EncoderSpec(
        embed_dim=128,
        depth=6,
        heads=4,
        taken=(1, 2, 4, 5),
        features=32,
        out_channels=(24, 48, 96, 128),
    ),
    "vits": EncoderSpec(
        embed_dim=384,
        depth=12,
        heads=6,
        taken=(2, 5, 8, 11),
        features=64,
        out_channels=(48, 96, 192, 384),
    ),
    "vitb": EncoderSpec(
        embed_dim=768,
        depth=12,
        heads=12,
        taken=(2, 5, 8, 11),
        features=128,
        out_channels=(96, 192, 384, 768),
    ),
    "vitl": EncoderSpec(
        embed_dim=1024,
        depth=24,
        heads=16,
        taken=(4, 11, 17, 23),
        features=256,
        out_channels=(256, 512, 1024, 1024),
    ),
    "vitg": EncoderSpec(
        embed_dim=1536,
        depth=40,
        heads=24,
        taken=(9, 19, 29, 39),
        features=384,
        out_channels=(1536, 1536, 1536, 1536),
        swiglu=True,
    ),
}
"""The four official sizes, and ``vitt``: ours, trained from scratch for quickstarts on a CPU."""


OFFICIAL_NAME = re.compile(
    r"depth_anything_v2(?:_metric_(?P<data>hypersim|vkitti))?_(?P<encoder>vit[sblg])(?:_fp(?:16|32))?"
)
"""What the official files are called, without suffix; they say nothing about themselves."""
OFFICIAL_MAX_DEPTH_M = {"hypersim": "20.0", "vkitti": "80.0"}
VERSION_1_NAME = re.compile(r"depth_anything_vit[sbl]14")

SKY_STACK = "depth_head.scratch.sky_output_conv2."
"""What names of tensors begin with that Depth Anything 3 has and version 2 has not."""


class DepthAnythingV2(DepthNetwork):
    """Depth Anything V2; ``DepthNetwork`` has its arguments."""

    name = "depth_anything_v2"
    title = "Depth Anything V2"
    architecture = "Depth Anything V2 architecture"
    probed = True
    sizes = ENCODERS
    stem = ("cls_token", "pos_embed", "patch_embed.")
    adapted = r"pretrained\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.(fc1|fc2|w12|w3))"

    @staticmethod
    def parts(spec: EncoderSpec, encoder: bool, head: bool) -> tuple[nn.Module, nn.Module]:
        return DinoV2(spec, recompute=encoder), DPTHead(spec, recompute=head)

    def logits(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b _ h w"]:
        grid = (image.shape[-2] // PATCH, image.shape[-1] // PATCH)
        return self.depth_head(self.pretrained(image), grid)

    @classmethod
    def licence(cls, encoder: str) -> tuple[str, str] | None:
        sizes = {"vits": "Small", "vitb": "Base", "vitl": "Large", "vitg": "Giant"}
        if encoder not in sizes:
            return None
        name = f"The official Depth Anything V2 {sizes[encoder]} weights are"
        if encoder == "vits":
            return "apache-2.0", f"{name} Apache-2.0, and so are weights derived from them."
        return (
            "cc-by-nc-4.0",
            f"{name} CC-BY-NC-4.0, which weights derived from them inherit: no commercial use.",
        )

    @classmethod
    def named(cls, stem: str) -> Mapping[str, str] | None:
        if VERSION_1_NAME.fullmatch(stem):
            raise UserError(
                f"{stem} is a file of Depth Anything version 1, whose head reads other blocks of "
                "the encoder; take a depth_anything_v2 file"
            )
        name = OFFICIAL_NAME.fullmatch(stem)
        if name is None:
            return None
        said = {"encoder": name["encoder"], "kind": "relative"}
        if name["data"]:
            said |= {"kind": "metric", "max_depth_m": OFFICIAL_MAX_DEPTH_M[name["data"]]}
        return said

    @classmethod
    def configured(cls, config: Mapping[str, object], source: str) -> Mapping[str, str] | None:
        from flatdepth.models import huggingface  # which takes the sizes from here

        return huggingface.read_config(config, source)

    @classmethod
    def renamed(cls, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]] | None:
        from flatdepth.models import huggingface

        if huggingface.is_huggingface(tensors):
            own = huggingface.from_huggingface(tensors)
            return own, ["renamed the tensors from the layout of transformers"]
        if "patch_embed.proj.weight" in tensors:
            own = {f"pretrained.{name}": tensor for name, tensor in tensors.items()}
            return own, ["put the prefix 'pretrained.' before every name of a plain DINOv2 encoder"]
        if "pretrained.cls_token" not in tensors:
            return None
        is_newer = any(name.startswith(SKY_STACK) for name in tensors)
        return None if is_newer else (dict(tensors), [])

    @classmethod
    def size_of(cls, tensors: Mapping[str, Tensor]) -> str | None:
        found = width_and_depth(tensors)
        sizes = {(spec.embed_dim, spec.depth): name for name, spec in cls.sizes.items()}
        return None if found is None else sizes.get(found)


def width_and_depth(tensors: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Width and number of blocks of the encoder below ``pretrained.``; None if there is none."""
    token = tensors.get("pretrained.cls_token")
    if token is None or token.ndim == 0:
        return None
    prefix = "pretrained.blocks."
    inside = (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))
    return token.shape[-1], len({name.split(".")[0] for name in inside})


class DinoV2(nn.Module):
    """The encoder: a DINOv2 vision transformer without registers.

    ``forward`` takes a normalised image and returns the patch tokens (b, rows * cols, d) of the
    four taken blocks, each through the final norm. The class token only takes part in attention.
    """

    def __init__(self, spec: EncoderSpec, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.taken = spec.taken
        dim = spec.embed_dim
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + GRID * GRID, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = PatchEmbed(dim)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b n d"]]:
        x = self.patch_embed(image)
        x = torch.cat((self.cls_token.repeat(x.shape[0], 1, 1), x), dim=1)
        grid = (image.shape[-2] // PATCH, image.shape[-1] // PATCH)
        x = x + resize_position_embedding(self.pos_embed, grid)
        taken = []
        for index, block in enumerate(self.blocks):
            x = call(block, x, recompute=self.recompute)
            if index in self.taken:
                taken.append(self.norm(x)[:, 1:])
        return taken


def resize_position_embedding(
    pos_embed: Float[Tensor, "1 m d"], grid: tuple[int, int]
) -> Float[Tensor, "1 n d"]:
    """Resample the 37 x 37 position embedding to ``grid`` = (rows, cols); the class token's stays.

    Bicubic (a = -0.75) without antialiasing, float32. The scale handed to the interpolation is
    (n + 0.1) / 37 along each axis, not n / 37, so output i samples the input at
    (i + 0.5) * 37 / (n + 0.1) - 0.5. DINOv2 added the 0.1 against sizes that round down; it also
    moves the samples, so it is kept to predict what the official code predicts.
    """
    if torch.compiler.is_exporting():
        return _resize_by_matrices(pos_embed, grid)
    if grid == (GRID, GRID):
        return pos_embed
    dim = pos_embed.shape[-1]
    patches = pos_embed[:, 1:].float().reshape(1, GRID, GRID, dim).permute(0, 3, 1, 2)
    scale = [(n + 0.1) / GRID for n in grid]
    patches = F.interpolate(patches, scale_factor=scale, mode="bicubic", antialias=False)
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], dim)
    return torch.cat((pos_embed[:, :1], patches.to(pos_embed.dtype)), dim=1)


def _resize_by_matrices(
    pos_embed: Float[Tensor, "1 m d"], grid: tuple[int, int]
) -> Float[Tensor, "1 n d"]:
    """The same for a graph, whose grid is no number: one matrix of weights along each axis.

    ONNX has no interpolation that takes size and scale. Keys 1981, "Cubic convolution
    interpolation", equation 4 with a = -0.75; the border is repeated.
    """
    sides = [torch.full((), n, dtype=torch.float32, device=pos_embed.device) for n in grid]
    is_own = (sides[0] == GRID) & (sides[1] == GRID)
    knots = torch.arange(-2.0, GRID + 2, device=pos_embed.device)
    rows, columns = (
        _cubic(
            (torch.arange(n, device=pos_embed.device) + 0.5)[:, None]
            * (GRID / (side + torch.where(is_own, 0.0, 0.1)))
            - (0.5 + knots)
        )
        for n, side in zip(grid, sides, strict=True)
    )
    dim = pos_embed.shape[-1]
    patches = pos_embed[:, 1:].float().reshape(1, GRID, GRID, dim).permute(0, 3, 1, 2)
    patches = rows @ F.pad(patches, (2, 2, 2, 2), mode="replicate") @ columns.T
    patches = patches.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], dim)
    return torch.cat((pos_embed[:, :1], patches.to(pos_embed.dtype)), dim=1)


def _cubic(distance: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
    x, a = distance.abs(), -0.75
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


class PatchEmbed(nn.Module):
    """14 x 14 pixels to one token; tokens run row by row."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        _init(self.proj, 0.02)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b n d"]:
        return self.proj(image).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """A pre-norm transformer block with layer scale on both branches."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        dim = spec.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, spec.heads)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim) if spec.swiglu else MLP(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = _linear(dim, 3 * dim)
        self.proj = _linear(dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return x * self.gamma


class MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = _linear(dim, 4 * dim)
        self.fc2 = _linear(4 * dim, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGLU(nn.Module):
    """Shazeer 2020, "GLU Variants Improve Transformer", at two thirds of the MLP's width.

    The width is rounded up to a multiple of 8.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = (4 * dim * 2 // 3 + 7) // 8 * 8
        self.w12 = _linear(dim, 2 * hidden)
        self.w3 = _linear(hidden, dim)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class DPTHead(nn.Module):
    """The head: four maps of tokens at 4, 2, 1 and 1/2 times the patch grid, fused coarse to fine.

    ``forward`` takes the encoder's four lists of tokens, shallow to deep, and the patch grid
    (rows, cols); it returns logits (b, 1, 14 rows, 14 cols). It runs in five parts, four fusions
    and the output, which are the units of recomputation.
    """

    def __init__(self, spec: EncoderSpec, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        c1, c2, _, c4 = spec.out_channels
        self.projects = nn.ModuleList(_conv(spec.embed_dim, c, 1) for c in spec.out_channels)
        self.resize_layers = nn.ModuleList(
            (_upsample(c1, 4), _upsample(c2, 2), nn.Identity(), _conv(c4, c4, 3, stride=2))
        )
        self.scratch = Scratch(spec.out_channels, spec.features)

    def forward(
        self, taken: Sequence[Float[Tensor, "b n d"]], grid: tuple[int, int]
    ) -> Float[Tensor, "b _ h w"]:
        rows, cols = grid
        path: Tensor | None = None
        for level in (4, 3, 2, 1):
            # Every fusion ends at the resolution of the next finer level, the last one beyond it.
            zoom = 2 ** (4 - level)
            size = (zoom * rows, zoom * cols)
            tokens = taken[level - 1]
            path = call(self._fuse, level, tokens, grid, path, size, recompute=self.recompute)
        return call(self._output, path, grid, recompute=self.recompute)

    def _fuse(
        self,
        level: int,
        tokens: Float[Tensor, "b n d"],
        grid: tuple[int, int],
        path: Float[Tensor, "b c h w"] | None,
        size: tuple[int, int],
    ) -> Float[Tensor, "b c h2 w2"]:
        x = self.projects[level - 1](tokens.transpose(1, 2).unflatten(-1, grid))
        x = self.resize_layers[level - 1](x)
        x = getattr(self.scratch, f"layer{level}_rn")(x)
        return getattr(self.scratch, f"refinenet{level}")(x, path, size)

    def _output(
        self, path: Float[Tensor, "b c h w"], grid: tuple[int, int]
    ) -> Float[Tensor, "b _ h2 w2"]:
        x = self.scratch.output_conv1(path)
        return self.scratch.output_conv2(resize(x, (PATCH * grid[0], PATCH * grid[1])))


class Scratch(nn.Module):
    """The head's layers below ``depth_head.scratch``; ``DPTHead`` says how they are used.

    Args:
        out_channels: of the four levels, fine to coarse.
        features: channels of the fusion path.
    """

    def __init__(self, out_channels: Sequence[int], features: int) -> None:
        super().__init__()
        c = features
        for level, channels in enumerate(out_channels, start=1):
            self.add_module(f"layer{level}_rn", _conv(channels, c, 3, bias=False))
        for level in (1, 2, 3, 4):
            self.add_module(f"refinenet{level}", Fusion(c))
        self.output_conv1 = _conv(c, c // 2, 3)
        self.output_conv2 = output_stack(c)


def output_stack(features: int) -> nn.Sequential:
    """What makes one value of a pixel of ``output_conv1``, whose path had so many channels."""
    # The last gain starts the logits within about 1 of their mean: nothing is saturated.
    return nn.Sequential(_conv(features // 2, 32, 3), nn.ReLU(), _conv(32, 1, 1, gain=0.5))


class Fusion(nn.Module):
    """Adds a level to the coarser path, refines the sum and enlarges it (RefineNet)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_conv = _conv(channels, channels, 1)
        self.resConfUnit1 = ResidualConv(channels)
        self.resConfUnit2 = ResidualConv(channels)

    def forward(
        self,
        level: Float[Tensor, "b c h w"],
        path: Float[Tensor, "b c h w"] | None,
        size: tuple[int, int],
    ) -> Float[Tensor, "b c h2 w2"]:
        x = level if path is None else path + self.resConfUnit1(level)
        # The official order is resize, then out_conv. A 1 x 1 convolution commutes with weights
        # that sum to 1, and before the resize it works on a quarter of the pixels.
        return resize(self.out_conv(self.resConfUnit2(x)), size)


class ResidualConv(nn.Module):
    """Two pre-activated 3 x 3 convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = _conv(channels, channels, 3, gain=math.sqrt(2))
        self.conv2 = _conv(channels, channels, 3, gain=math.sqrt(2))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    _init(layer, 0.02)
    return layer


def _conv(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = True, gain: float = 1.0
) -> nn.Conv2d:
    """A convolution that multiplies the standard deviation by about ``gain`` when it is new.

    After a ReLU, which halves the mean square, ``gain`` sqrt(2) keeps it (He et al. 2015).
    """
    layer = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=bias)
    _init(layer, gain / math.sqrt(inputs * kernel * kernel))
    return layer


def _upsample(channels: int, factor: int) -> nn.ConvTranspose2d:
    layer = nn.ConvTranspose2d(channels, channels, factor, stride=factor)
    # Kernel and stride are equal: each output pixel sums over the channels of one input pixel.
    _init(layer, 1 / math.sqrt(channels))
    return layer


def _init(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, std: float) -> None:
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
