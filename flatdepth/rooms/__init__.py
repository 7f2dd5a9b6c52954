"""Generated rooms with exact depth, and generated pictures to hang in them: nothing to download.

Rooms are boxes with textured walls, furniture, area lights and windows onto an outdoors that is
really there (its depth is the ground's and the houses', +inf for the sky). Nothing flat on a wall
ever shows depth: what looks like a picture of another place is only ever pasted by training.

A room is a function of ``(seed, scene)``, a frame of ``(seed, scene, frame)`` and a picture of
``(seed, picture)``: any subset, in any order and in any process, has the same pixels. (On another
kind of processor numpy may round the last bit of a logarithm differently, and Pillow's JPEG may
differ between versions.)

The modules, each of which uses only earlier ones:

    vectors streams colour            world frame, random streams, sRGB
    paint textures surfaces bodies    what a scene is made of
    scene camera                      all of it together, and who looks at it
    raycast light lightmap shade      depth, baked light, radiance
    build furniture windows furnish   parts of rooms and where they go
    outdoors interior pose            whole rooms, and cameras in them
    frames                            frames of rooms
    motifs styles pictures            pictures
"""

from flatdepth.rooms.frames import render_room
from flatdepth.rooms.pictures import render_picture

__all__ = ["render_picture", "render_room"]
