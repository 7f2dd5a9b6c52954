"""Every question that only a GPU answers, as a list of measurements with goals.

``flatdepth benchmark gpu`` runs it. ``rows`` is what a measurement says, ``runner`` runs the
list, each part in a process of its own, ``plan`` is the list, and the other modules are the parts.
"""
