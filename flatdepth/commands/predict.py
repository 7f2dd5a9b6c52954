"""Predict depth on pictures and videos.

flatdepth predict --checkpoint FILE photo.jpg folder "more/*.heic" --out DIR
flatdepth predict --checkpoint FILE photo.jpg --out DIR --write depth,npy,ply --tiles
flatdepth predict --checkpoint FILE clip.mp4 --out DIR --write side --steady

Writes below DIR, named after the inputs and in their folders:
  depth   NAME_depth.png   16 bits: mm, or inverse depth over the full range (--png_unit)
  npy     NAME_depth.npy   float32: metres, or relative inverse depth
  colour  NAME_colour.png  near warm, far cold
  side    NAME_side.png    the image beside its depth
  ply     NAME_points.ply  point cloud in metres (metric only), x right, y up, z towards the viewer:
                           upright in MeshLab and CloudCompare (turn y and z round for OpenCV)
  glb     NAME_mesh.glb    the picture as a surface in the same axes (metric only), for browsers,
                           Blender and phones
  and NAME_depth.json, which says what the values mean, with depth, npy, ply and glb.
Of a video (extra video) colour and side are one NAME_colour.mp4 and NAME_side.mp4; the others lie
in NAME_frames, a file per frame: 000000_depth.png and so on, its time in 000000_depth.json.

Exit code: 0 all inputs done; 1 some were skipped, each is named; 2 wrong usage, nothing to be done.
"""

import argparse
import sys
import warnings
from pathlib import Path

from flatdepth.cli import Parser, as_called, called, names, number, plain_warning
from flatdepth.config import MAX_DEPTH_M
from flatdepth.errors import UserError
from flatdepth.models.precision import chosen_device


def main(argv: list[str]) -> int:
    warnings.formatwarning = plain_warning
    chosen = parser().parse_intermixed_args(argv)
    from flatdepth.models.onnx_depth import OnnxDepth, open_depth
    from flatdepth.predict.predictor import PredictOptions, Summary, plan_inputs, predict_files
    from flatdepth.predict.videos import predict_videos

    options = PredictOptions(
        write=tuple(chosen.write),
        size=chosen.size,
        batch=chosen.batch,
        tiles=chosen.tiles,
        steady=chosen.steady,
        png_unit=chosen.png_unit,
        intrinsics=chosen.intrinsics,
        fov_deg=chosen.fov,
        focal_mm=chosen.focal_mm,
        sensor_mm=chosen.sensor_mm,
        unusual_camera=chosen.unusual_camera == "true",
        prune=chosen.prune,
        overwrite=chosen.overwrite,
        image_bits=chosen.image_bits,
    )
    device = chosen_device(chosen.device)
    inputs = plan_inputs(chosen.inputs, chosen.out, options)
    model, report = open_depth(
        chosen.checkpoint, device, kind=chosen.kind, max_depth_m=chosen.max_depth_m
    )
    print(report, file=sys.stderr)
    if chosen.no_calibration and isinstance(model, OnnxDepth):
        raise UserError("--no_calibration: that of a graph is inside it; take the weights instead")
    if chosen.no_calibration and model.calibration is not None:
        model.calibration = None
        print("note: --no_calibration: the weights predict without it", file=sys.stderr)
    pictures = [item for item in inputs if not item.is_video]
    videos = [item for item in inputs if item.is_video]
    parts = [
        predict(
            model,
            some,
            chosen.out,
            options,
            device=device,
            checkpoint=chosen.checkpoint,
        )
        for predict, some in ((predict_files, pictures), (predict_videos, videos))
        if some
    ]
    summary = Summary(
        written=[one for part in parts for one in part.written],
        skipped=[one for part in parts for one in part.skipped],
        out=chosen.out,
    )
    print(summary)
    return 1 if summary.skipped else 0


def parser() -> Parser:
    """The options."""
    result = Parser(prog=called("predict"), description=as_called("predict", __doc__))
    add = result.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="image, video, folder (with all below it) or pattern",
    )
    add(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="weight file, its folder, a hub id, or X.onnx",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the outputs")
    add(
        "--write",
        type=names("depth", "npy", "colour", "side", "ply", "glb"),
        default="depth,colour,side",
        metavar="LIST",
        help="what to write: depth, npy, colour, side, ply, glb (default: depth,colour,side)",
    )
    add("--overwrite", action="store_true", help="replace outputs that exist")
    add(
        "--image_bits",
        type=number(8, 16),
        default=16,
        metavar="N",
        help="bits of 16-bit grey images, as pack.py takes them (default: 16)",
    )
    network = result.add_argument_group("network").add_argument
    network(
        "--size",
        type=int,
        help="shorter side of its input in px (default: as in training, else 518)",
    )
    network("--tiles", action="store_true", help="full resolution from tiles of --size px")
    network("--steady", action="store_true", help="take the flicker out of videos")
    network("--batch", type=int, default=4, help="photos or tiles at once (default: 4)")
    network("--device", choices=("cuda", "cpu"), help="default: cuda if there is a GPU")
    weights = result.add_argument_group("weights").add_argument
    weights(
        "--kind", choices=("metric", "relative", "affine"), help="of weights that do not say it"
    )
    weights(
        "--max_depth_m",
        type=number(*MAX_DEPTH_M),
        metavar="M",
        help="of metric weights that do not say it: 20 indoor, 80 outdoor",
    )
    weights(
        "--no_calibration",
        action="store_true",
        help="leave out what flatdepth checkpoint calibrate has put into the weights",
    )
    depth = result.add_argument_group("depth PNG, point cloud and mesh").add_argument
    depth(
        "--png_unit",
        choices=("mm", "cm", "inverse"),
        default="mm",
        help="mm reaches 65.5 m, cm 655 m, inverse depth fills the range (default: mm; relative "
        "weights: always inverse)",
    )
    depth(
        "--intrinsics",
        type=four_numbers,
        metavar="FX,FY,CX,CY",
        help="in pixels, cx and cy for pixel centres at integers (OpenCV), as pack.py takes them",
    )
    depth(
        "--fov",
        type=float,
        metavar="DEG",
        help="horizontal field of view (default: by EXIF, else 60)",
    )
    depth("--focal_mm", type=number(1e-3, 1e5), metavar="MM", help="focal length; with --sensor_mm")
    depth("--sensor_mm", metavar="WxH", help="size of the sensor in mm (36x24), or its width")
    depth(
        "--unusual_camera",
        choices=("true", "false"),
        default="false",
        help="true: take any field of view and any ratio of fx and fy",
    )
    depth(
        "--prune",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="leave out points where depth jumps by more than this share (default: 0.05)",
    )
    return result


def four_numbers(text: str) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy."""
    try:
        fx, fy, cx, cy = (float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected FX,FY,CX,CY, got {text!r}") from error
    return fx, fy, cx, cy
