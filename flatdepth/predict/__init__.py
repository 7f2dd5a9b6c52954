"""Depth of anybody's pictures: inputs, tiles, files, point clouds."""
