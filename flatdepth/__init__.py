"""flatdepth: train monocular depth models not to be fooled by flat things that show a scene."""

__version__ = "0.1.0"
