"""Furnished rooms and streets for ``tools/render_rooms.py``.

Metres, z up. Everything is made as plain arrays first (``model``), from random numbers that depend
on what is rendered alone; only ``cycles`` and ``truth`` know Blender.
"""
