"""Pastes as pixels: their contents on the CPU, and the warp with the exact truth on the device."""
