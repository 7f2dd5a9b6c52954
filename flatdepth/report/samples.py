"""What a report shows of runs that cannot be read off their files: their weights on held-out data.

All runs are judged on the samples that the first one holds out, clean and pasted, so that their
figures are paired; then the pictures that they do worst on are made again and kept.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64, UInt8

from flatdepth.config import TrainConfig
from flatdepth.data.frames import Corpus, Subset, open_corpus
from flatdepth.data.loader import truth_range_m
from flatdepth.errors import UserError
from flatdepth.judge.protocol import PROTOCOLS
from flatdepth.judge.scoring import (
    Request,
    Verdict,
    judge,
    load_sample,
    look,
    paste_owner,
    run_config,
)
from flatdepth.report.preview import plane_residual
from flatdepth.types import REGIONS, Region

_LEAST_PIXELS = 64
_SHOWN = ("mirror", "art", "frame", "decoy", "background", "clean")
_CLOUDS = ("mirror", "art", "clean")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shot:
    """One picture with its truth and what every run says about it.

    Attributes:
        dataset, key: the frame.
        pasted: whether it went through the paste stage.
        plan: its pastes in words.
        image: uint8 sRGB.
        truth_m: planar z in metres, NaN where it does not count.
        region: values of ``Region``.
        owner: number of the mirror or picture that each pixel shows, -1 elsewhere.
        K_px: intrinsics.
        depths_m: per run, planar z in metres.
        errors: per run the AbsRel of the region that the picture was chosen for.
    """

    dataset: str
    key: str
    pasted: bool
    plan: str
    image: UInt8[np.ndarray, "h w 3"]
    truth_m: Float32[np.ndarray, "h w"]
    region: UInt8[np.ndarray, "h w"]
    owner: Int64[np.ndarray, "h w"]
    K_px: Float64[np.ndarray, "3 3"]
    depths_m: Sequence[Float32[np.ndarray, "h w"]]
    errors: Sequence[float]

    @property
    def valid(self) -> Bool[np.ndarray, "h w"]:
        return np.isfinite(self.truth_m)

    def relief(self, run: int) -> Float64[np.ndarray, "h w"]:
        """How far a run's depth is from flat on each mirror and picture, NaN elsewhere.

        ``(1/p) / (m . ray) - 1`` with the plane m that fits 1/p best on that surface.
        """
        # The fit needs every number up to the largest to have pixels.
        _, dense = np.unique(np.append(self.owner, -1), return_inverse=True)
        owner = dense[:-1].reshape(self.owner.shape) - 1
        return plane_residual(self.depths_m[run], self.valid, owner, self.K_px)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exhibits:
    """The judgement of several runs and the pictures behind it.

    Attributes:
        verdict: contenders are the runs in their order.
        worst: region -> the pictures with the largest AbsRel of any run there, worst first.
        clouds: pictures to be shown as point clouds.
    """

    verdict: Verdict
    worst: Mapping[str, Sequence[Shot]]
    clouds: Sequence[Shot]


def judge_runs(
    runs: Sequence[Path],
    *,
    weights: str,
    images: int,
    size: int | None,
    worst: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> Exhibits:
    """Judge the weights of runs on what the first run holds out.

    Args:
        weights: ``final`` or ``best``.
        images: most pictures per data set, evenly spaced; 0: all.
        size: shorter side of the network's input; None: that of the runs.
        worst: pictures to show per region.
        progress: called with (pictures done, pictures in all).

    Raises:
        UserError: a run has no such weights, its data are not at hand, or runs do not compare.
    """
    checkpoints = [run / "weights" / f"{weights}.safetensors" for run in runs]
    for run, checkpoint in zip(runs, checkpoints, strict=True):
        if not checkpoint.is_file():
            raise UserError(
                f"{run} holds no weights/{checkpoint.name}; finish the run, or choose others with "
                "--weights"
            )
    config = run_config(str(checkpoints[0]))
    if config is None:
        raise UserError(
            f"{runs[0] / 'config.yaml'} is of another version of flatdepth, so its data cannot be "
            "opened; train again"
        )
    corpus = open_corpus(config.data)
    request = _request(checkpoints, config, images, size)
    verdict = judge(request, device, progress, subsets=corpus.val)
    shots = _Studio(request, verdict, corpus, device)
    places = {region: _worst(verdict, region, worst) for region in _SHOWN}
    shown = {
        region: [shots.take(identity, region, errors) for identity, errors in found]
        for region, found in places.items()
        if found
    }
    clouds = [shot for region in _CLOUDS for shot in shown.get(region, [])[:1]]
    return Exhibits(verdict=verdict, worst=shown, clouds=clouds)


def _request(
    checkpoints: Sequence[Path], config: TrainConfig, images: int, size: int | None
) -> Request:
    count = len(checkpoints)
    data = config.data.val or [entry.path for entry in config.data.train]
    return Request(
        checkpoints=tuple(map(str, checkpoints)),
        kinds=(None,) * count,
        max_depths_m=(None,) * count,
        trained_on=(None,) * count,
        data=tuple(data),
        art=tuple(config.data.art),
        part="all" if config.data.val else "val",
        protocol=dataclasses.replace(PROTOCOLS["none"], range_m=truth_range_m(config)),
        size=size,
        paste_seed=config.eval.seed,
        images=images,
        batch=config.eval.batch,
        threads=config.data.threads,
    )


def _worst(verdict: Verdict, region: str, count: int) -> list[tuple[int, list[float]]]:
    """(identity, AbsRel per run) of the pictures with the largest AbsRel of any run."""
    errors: dict[int, list[float]] = {}
    for domain in verdict.domains:
        for scores in domain.scores:
            keys, values = scores.depth.state()
            column = values[:, scores.depth.columns.index("abs_rel")].tolist()
            for (identity, number, pixels), error in zip(keys.tolist(), column, strict=True):
                if REGIONS[number] == region and pixels >= _LEAST_PIXELS:
                    errors.setdefault(identity, []).append(error)
    return sorted(errors.items(), key=lambda entry: (-max(entry[1]), entry[0]))[:count]


@dataclass(frozen=True, slots=True)
class _Studio:
    """Makes pictures of the verdict again."""

    request: Request
    verdict: Verdict
    corpus: Corpus
    device: torch.device

    def take(self, identity: int, region: str, errors: Sequence[float]) -> Shot:
        subset, place = self._find(identity)
        pasted = region != "clean"
        sample = load_sample(self.request, subset, place, self.corpus.pictures, pasted=pasted)
        verdict = self.verdict
        seen = look([sample], self.request, verdict.contenders, verdict.size, self.device)
        batch = seen.batch
        truth = torch.where(seen.counted, batch.depth_m, torch.nan)[0, 0]
        owner = paste_owner(batch.depth_m, batch.K_px, sample.plan)
        flat = (batch.region == Region.MIRROR) | (batch.region == Region.ART)
        image = (batch.image[0].movedim(0, -1) * 255).round().to(torch.uint8)
        return Shot(
            dataset=sample.frame.dataset,
            key=sample.frame.key,
            pasted=pasted,
            plan=", ".join(paste.describe() for paste in sample.plan),
            image=image.cpu().numpy(),
            truth_m=truth.cpu().numpy(),
            region=batch.region[0, 0].cpu().numpy(),
            owner=torch.where(flat & seen.counted, owner, -1)[0, 0].cpu().numpy(),
            K_px=batch.K_px[0].cpu().numpy(),
            depths_m=[depth_m[0, 0].float().cpu().numpy() for depth_m in seen.depths_m],
            errors=errors,
        )

    def _find(self, identity: int) -> tuple[Subset, int]:
        for subset in self.corpus.val:
            row = identity - subset.first_identity
            place = int(np.searchsorted(subset.rows, row))
            if place < len(subset) and subset.rows[place] == row:
                return subset, place
        raise ValueError(f"sample {identity} is in no subset")
