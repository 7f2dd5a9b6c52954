"""Frames: raw layouts, packing, shard sets, which frames a run has, and their way to the device."""
