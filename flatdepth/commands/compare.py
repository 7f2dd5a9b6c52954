"""Show pictures through several depth systems side by side, to choose one by looking.

flatdepth compare --model depth_anything_v2 --model marigold --model zoedepth --out DIR
flatdepth compare --model ours=runs/NAME/weights/final.safetensors --model dpt_large
    --input photos --out DIR
flatdepth compare --model midas_v21=midas_v21_384.pt --input shards/flatbench --images 20 --out DIR

NAME is a system of the list below with its published weights, NAME=WEIGHTS with others (a file, a
folder or a hub id; random or random:SIZE for none), LABEL=WEIGHTS anything that says what it is.
Every system sees a picture as its authors resize it. What a system knows up to scale and shift is
fitted to the truth where the input has it (shard sets), else to the first system that predicts
metres; the page says so.

Writes below DIR:
  compare.html      all pictures, to slide, to turn as point clouds, and the figures by region
  NAME_sheet.png    one picture by every system
  compare.json      the figures, and how each system was run
  with --write npy,ply also, per system, the aligned depth (float32) and a point cloud

Without --input: a room with mirrors, one with a painting, a street with a mural (shards/flatbench).

"""

from pathlib import Path

from flatdepth.cli import Parser, as_called, called, names, number
from flatdepth.commands.predict import four_numbers
from flatdepth.errors import UserError
from flatdepth.models.precision import chosen_device


def main(argv: list[str]) -> None:
    chosen = parser().parse_args(argv)
    from flatdepth.data.progress import picture_progress
    from flatdepth.predict.predictor import PredictOptions
    from flatdepth.predict.systems import Settings
    from flatdepth.report.side_by_side import PAGE, compare, read_pictures, targets, write

    settings = Settings(
        size=chosen.size,
        tiles=chosen.tiles,
        steps=chosen.steps,
        ensemble=chosen.ensemble,
        seed=chosen.seed,
    )
    cameras = PredictOptions(intrinsics=chosen.intrinsics, fov_deg=chosen.fov)
    device = chosen_device(chosen.device)
    out: Path = chosen.out
    pictures = read_pictures(chosen.input, out, most=chosen.images, cameras=cameras)
    for target in [] if chosen.overwrite else targets(pictures, out):
        if target.exists():
            raise UserError(f"{target} would be overwritten; choose another --out or --overwrite")
    comparison = compare(chosen.model, pictures, settings, device, picture_progress())
    write(comparison, out, chosen.write)
    print(f"{len(pictures)} pictures by {len(comparison.systems)} systems; open {out / PAGE}")


def parser() -> Parser:
    """The options."""
    from flatdepth.predict.systems import SYSTEMS

    about = f"{__doc__}Systems: {', '.join(SYSTEMS)}."
    result = Parser(prog=called("compare"), description=as_called("compare", about))
    add = result.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="NAME[=WEIGHTS]",
        help="a system; may be repeated",
    )
    add("--input", nargs="+", default=[], metavar="INPUT", help="images, folders or shard sets")
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the outputs")
    add("--overwrite", action="store_true", help="replace outputs that exist")
    add(
        "--images",
        type=number(0, 10**6),
        default=3,
        metavar="N",
        help="most frames of a shard set, evenly spaced; 0: all (default: 3)",
    )
    add(
        "--write",
        type=names("npy", "ply"),
        default=[],
        metavar="LIST",
        help="what to write besides: npy, ply (default: nothing)",
    )
    add("--size", type=int, help="shorter side of all inputs, about, in px (default: their own)")
    add("--tiles", action="store_true", help="full resolution from tiles of the input's size")
    add("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    camera = result.add_argument_group("camera of images without EXIF").add_argument
    camera("--intrinsics", type=four_numbers, metavar="FX,FY,CX,CY", help="as flatdepth predict")
    camera("--fov", type=float, metavar="DEG", help="horizontal field of view (default: 60)")
    diffusion = result.add_argument_group("diffusion (Marigold)").add_argument
    diffusion("--steps", type=int, help="denoising steps (default: as the weights say)")
    diffusion("--ensemble", type=int, default=1, help="predictions to take the median of")
    diffusion("--seed", type=int, default=0, help="of the noise (default: 0)")
    return result
