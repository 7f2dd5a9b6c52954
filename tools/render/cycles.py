"""What Blender does: materials, light, the path-traced image."""

import math
import tempfile
from pathlib import Path
from typing import Any

import bpy
import numpy as np
from mathutils import Matrix
from PIL import Image

from render.looks import dimmed
from render.model import Part, Surface
from render.stage import Camera, Lamp, Stage

TARGET_GREY = 0.2
"""Linear luminance to which the middle of an image is brought; see ``exposure``."""


def new_scene(samples: int, device: str) -> None:
    """An empty scene with the settings of every render."""
    bpy.ops.wm.read_factory_settings(use_empty=True)
    scene = bpy.context.scene
    scene.render.engine = "CYCLES"
    cycles = scene.cycles
    if device != "CPU":
        preferences = bpy.context.preferences.addons["cycles"].preferences
        preferences.compute_device_type = device
        preferences.refresh_devices()
        for found in preferences.devices:
            found.use = found.type == device
        cycles.device = "GPU"
    cycles.samples, cycles.use_adaptive_sampling = samples, False
    cycles.use_denoising, cycles.denoiser = True, "OPENIMAGEDENOISE"
    cycles.denoising_prefilter = "FAST"
    cycles.max_bounces, cycles.diffuse_bounces, cycles.glossy_bounces = 5, 3, 4
    cycles.transmission_bounces = 2
    cycles.use_light_tree = True
    cycles.sample_clamp_indirect = 4.0
    cycles.caustics_reflective = False
    cycles.blur_glossy = 0.5
    cycles.seed = 1


def place_camera(camera: Camera) -> None:
    """Blender's camera of a pinhole whose axis goes through the image's centre."""
    scene = bpy.context.scene
    data = bpy.data.cameras.new("camera")
    data.sensor_fit, data.sensor_width = "HORIZONTAL", 36.0
    data.lens = 36.0 * camera.focal_px / camera.width
    data.clip_start, data.clip_end = 0.01, 1000.0
    thing = bpy.data.objects.new("camera", data)
    pose = np.eye(4)
    pose[:3, :3] = camera.axes.T @ np.diag([1.0, -1.0, -1.0])  # Blender looks along -z, y is up
    pose[:3, 3] = camera.eye
    thing.matrix_world = Matrix(pose.tolist())
    scene.collection.objects.link(thing)
    scene.camera = thing
    scene.render.resolution_x, scene.render.resolution_y = camera.width, camera.height
    scene.render.resolution_percentage = 100


def mesh_of(parts: list[Part]) -> bpy.types.Object:
    """One mesh of all parts, with a slot per surface; polygons come in the order of the faces."""
    surfaces = list(dict.fromkeys(part.surface for part in parts))
    slot = {surface: i for i, surface in enumerate(surfaces)}
    offsets = np.cumsum([0] + [len(part.vertices) for part in parts])
    vertices = np.concatenate([part.vertices for part in parts])
    faces = [
        [offset + i for i in face]
        for part, offset in zip(parts, offsets.tolist(), strict=False)
        for face in part.faces
    ]
    mesh = bpy.data.meshes.new("room")
    mesh.from_pydata(vertices.tolist(), [], faces)
    layer = mesh.uv_layers.new(name="metres")
    layer.uv.foreach_set("vector", np.concatenate([p.uv for p in parts]).astype(np.float32).ravel())
    counts = [len(part.faces) for part in parts]
    slots = np.repeat([slot[part.surface] for part in parts], counts).astype(np.int32)
    mesh.polygons.foreach_set("material_index", slots)
    mesh.polygons.foreach_set("use_smooth", np.repeat([part.smooth for part in parts], counts))
    for surface in surfaces:
        mesh.materials.append(material(surface))
    thing = bpy.data.objects.new("room", mesh)
    bpy.context.scene.collection.objects.link(thing)
    return thing


def remove_mesh() -> None:
    """Take away what ``mesh_of`` made, its materials too."""
    bpy.data.meshes.remove(bpy.data.meshes["room"])
    for made in list(bpy.data.materials):
        bpy.data.materials.remove(made)


def material(surface: Surface) -> bpy.types.Material:
    """The principled surface with its pattern; ``pattern="mirror"`` is a perfect one."""
    made = bpy.data.materials.new(surface.pattern)
    tree = made.node_tree
    shader = tree.nodes.get("Principled BSDF")
    if surface.pattern == "mirror":
        glossy = tree.nodes.new("ShaderNodeBsdfAnisotropic")
        glossy.inputs["Roughness"].default_value = 0.0
        glossy.inputs["Color"].default_value = (*surface.colour, 1.0)
        tree.links.new(glossy.outputs[0], tree.nodes["Material Output"].inputs["Surface"])
        return made
    shader.inputs["Roughness"].default_value = surface.roughness
    shader.inputs["Metallic"].default_value = surface.metallic
    colour, height = Painter(tree, surface).paint()
    tree.links.new(colour, shader.inputs["Base Color"])
    if surface.glow:
        tree.links.new(colour, shader.inputs["Emission Color"])
        shader.inputs["Emission Strength"].default_value = surface.glow
    if surface.bump:
        bump = tree.nodes.new("ShaderNodeBump")
        bump.inputs["Distance"].default_value = surface.bump
        tree.links.new(height, bump.inputs["Height"])
        tree.links.new(bump.outputs[0], shader.inputs["Normal"])
    return made


class Painter:
    """The shader nodes of a pattern."""

    def __init__(self, tree: bpy.types.NodeTree, surface: Surface) -> None:
        self.tree, self.surface = tree, surface
        self.uv = tree.nodes.new("ShaderNodeTexCoord").outputs["UV"]

    def node(self, kind: str, vector: object = None, **inputs: object) -> bpy.types.Node:
        made = self.tree.nodes.new(f"ShaderNode{kind}")
        if vector is not None:
            self.tree.links.new(vector, made.inputs["Vector"])
        for name, value in inputs.items():
            socket = made.inputs[name.replace("_", " ")]
            if isinstance(value, bpy.types.NodeSocket):
                self.tree.links.new(value, socket)
            else:
                socket.default_value = (*value, 1.0) if isinstance(value, tuple) else value
        return made

    def scaled(self, x: float, y: float) -> bpy.types.NodeSocket:
        made = self.node("Mapping", self.uv)
        made.inputs["Scale"].default_value = (x, y, 1.0)
        return made.outputs[0]

    def noise(self, x: float, y: float, detail: float = 4.0, bend: float = 0.0) -> Any:
        made = self.node("TexNoise", self.scaled(x, y), Scale=1.0, Detail=detail, Distortion=bend)
        return made.outputs["Factor"]

    def ramp(self, factor: object, low: float = 0.0, high: float = 1.0) -> Any:
        """From ``colour`` at ``low`` to ``other`` at ``high``."""
        made = self.node("ValToRGB", Factor=factor)
        for end, place, colour in zip(
            made.color_ramp.elements,
            (low, high),
            (self.surface.colour, self.surface.other),
            strict=True,
        ):
            end.position, end.color = place, (*colour, 1.0)
        return made.outputs["Color"]

    def bricks(
        self, width: float, height: float, joint: float, mortar: object, shift: float
    ) -> Any:
        made = self.node(
            "TexBrick",
            self.uv,
            Color1=self.surface.colour,
            Color2=self.surface.other,
            Mortar=mortar,
            Scale=1.0,
            Mortar_Size=joint,
            Brick_Width=width,
            Row_Height=height,
        )
        made.offset, made.squash = shift, 1.0
        return made

    def shaded(self, colour: object, factor: object, low: float = 0.75) -> Any:
        """A colour, darkened where ``factor`` is low."""
        made = self.node("MapRange", Value=factor, To_Min=low, To_Max=1.15)
        mixed = self.node("Mix")
        mixed.data_type, mixed.blend_type = "RGBA", "MULTIPLY"
        mixed.inputs[0].default_value = 1.0
        self.tree.links.new(colour, mixed.inputs[6])
        self.tree.links.new(made.outputs[0], mixed.inputs[7])
        return mixed.outputs[2]

    def paint(self) -> tuple[Any, Any]:
        """Sockets of the colour and of the height, 0..1."""
        surface, size = self.surface, self.surface.size
        fine = self.noise(90 / size, 90 / size, 3)
        if surface.image:
            shown = self.node("TexImage", self.uv)
            shown.image = bpy.data.images.load(surface.image, check_existing=True)
            shown.extension = "EXTEND"
            return shown.outputs["Color"], fine
        dark = dimmed(surface.colour, 0.35)
        match surface.pattern:
            case "wood":
                grain = self.noise(1.2 / size, 14 / size, 6, 1.5)
                return self.ramp(grain, 0.3, 0.7), grain
            case "planks":
                boards = self.bricks(9 * size, size, 0.002, dark, 0.37)
                grain = self.noise(1.5 / size * 0.14, 2.5 / size, 6, 1.0)
                return self.shaded(boards.outputs["Color"], grain), boards.outputs["Factor"]
            case "tiles":
                tiles = self.bricks(size, size, 0.004, (0.45, 0.43, 0.4), 0.0)
                return tiles.outputs["Color"], tiles.outputs["Factor"]
            case "bricks":
                bricks = self.bricks(0.23, 0.075, 0.009, (0.5, 0.47, 0.42), 0.5)
                rough = self.noise(25, 25, 5)
                return self.shaded(bricks.outputs["Color"], rough, 0.55), bricks.outputs["Factor"]
            case "facade":  # windows as dark bricks, for houses far off
                panes = self.bricks(size, 3.0, 0.9, surface.other, 0.0)
                panes.inputs["Color1"].default_value = (0.05, 0.06, 0.08, 1.0)
                panes.inputs["Color2"].default_value = (0.12, 0.15, 0.2, 1.0)
                panes.inputs["Mortar"].default_value = (*surface.colour, 1.0)
                return panes.outputs["Color"], panes.outputs["Factor"]
            case "stripes":
                wave = self.node("TexWave", self.uv, Scale=0.314 / size)
                return self.ramp(wave.outputs["Factor"], 0.48, 0.52), wave.outputs["Factor"]
            case "checks":
                checks = self.node(
                    "TexChecker",
                    self.uv,
                    Color1=surface.colour,
                    Color2=surface.other,
                    Scale=1 / size,
                )
                return checks.outputs["Color"], fine
            case "dots":
                cells = self.node("TexVoronoi", self.uv, Scale=1 / size, Randomness=0.0)
                return self.ramp(cells.outputs["Distance"], 0.2, 0.24), cells.outputs["Distance"]
            case "leaves":
                bend = self.node(
                    "TexMagic", self.scaled(4 / size, 4 / size), Scale=1.0, Distortion=1.6
                )
                return self.ramp(bend.outputs["Factor"], 0.42, 0.5), bend.outputs["Factor"]
            case "rug":
                cells = self.node(
                    "TexMagic", self.scaled(3 / size, 3 / size), Scale=1.0, Distortion=3.0
                )
                mixed = self.ramp(cells.outputs["Factor"], 0.3, 0.6)
                return self.shaded(mixed, fine, 0.7), fine
            case "marble":
                veins = self.noise(1.5 / size, 1.5 / size, 8, 3.0)
                return self.ramp(veins, 0.42, 0.62), veins
            case "mottled":  # concrete, plaster, grass, foliage
                clouds = self.noise(3 / size, 3 / size, 9)
                return self.ramp(clouds, 0.3, 0.7), clouds
            case "fabric":
                tint = self.ramp(self.noise(400 / size, 60 / size, 2), 0.2, 0.8)
                return self.shaded(tint, fine, 0.8), fine
        plain = self.node("RGB").outputs[0]
        plain.default_value = (*surface.colour, 1.0)
        return self.shaded(plain, self.noise(2, 2), 0.9), fine


def light(stage: Stage) -> None:
    """The sky and the lamps of a stage."""
    world = bpy.data.worlds.new("sky")
    bpy.context.scene.world = world
    tree = world.node_tree
    where = tree.nodes.new("ShaderNodeTexCoord").outputs["Generated"]
    split = tree.nodes.new("ShaderNodeSeparateXYZ")
    tree.links.new(where, split.inputs[0])
    ramp = tree.nodes.new("ShaderNodeValToRGB")
    tree.links.new(split.outputs["Z"], ramp.inputs[0])
    ends = ramp.color_ramp.elements
    ends[0].color, ends[1].color = (*stage.horizon, 1.0), (*stage.zenith, 1.0)
    ends[1].position = 0.6
    background = tree.nodes["Background"]
    tree.links.new(ramp.outputs[0], background.inputs["Color"])
    background.inputs["Strength"].default_value = stage.sky_radiance
    for lamp in stage.lamps:
        bpy.context.scene.collection.objects.link(lamp_of(lamp))


def lamp_of(lamp: Lamp) -> bpy.types.Object:
    data = bpy.data.lights.new(lamp.kind, lamp.kind)
    data.energy, data.color = lamp.power, lamp.colour
    if lamp.kind == "SUN":
        data.angle = 0.01
    elif lamp.kind == "AREA":
        data.shape, data.size, data.size_y = "RECTANGLE", *lamp.size
    else:
        data.shadow_soft_size = lamp.size[0]
    thing = bpy.data.objects.new(lamp.kind, data)
    back = -np.array(lamp.aim) / np.linalg.norm(lamp.aim)
    side = np.cross((0, 0, 1), back) if abs(back[2]) < 0.99 else np.array((1.0, 0, 0))
    side /= np.linalg.norm(side)
    pose = np.eye(4)
    pose[:3] = np.column_stack([side, np.cross(back, side), back, lamp.place])
    thing.matrix_world = Matrix(pose.tolist())
    thing.visible_camera = thing.visible_glossy = False
    return thing


def render(exposure_stops: float | None) -> tuple[np.ndarray, float]:
    """Path-trace the scene.

    Args:
        exposure_stops: None finds the one that suits the image.

    Returns:
        (h, w, 3) uint8 sRGB, and the exposure.
    """
    scene = bpy.context.scene
    with tempfile.TemporaryDirectory() as folder:
        bpy.ops.render.render()
        result, settings = bpy.data.images["Render Result"], scene.render.image_settings
        if exposure_stops is None:
            settings.file_format, settings.color_mode = "OPEN_EXR", "RGB"
            linear = str(Path(folder, "linear.exr"))
            result.save_render(linear, scene=scene)
            exposure_stops = exposure(_pixels(linear))
        scene.view_settings.view_transform = "AgX"
        scene.view_settings.look = "AgX - Medium High Contrast"
        scene.view_settings.exposure = exposure_stops
        settings.file_format, settings.color_mode = "PNG", "RGB"
        shown = str(Path(folder, "shown.png"))
        result.save_render(shown, scene=scene)
        return np.asarray(Image.open(shown).convert("RGB")).copy(), exposure_stops


def _pixels(file: str) -> np.ndarray:
    image = bpy.data.images.load(file)
    values = np.empty(len(image.pixels), np.float32)
    image.pixels.foreach_get(values)
    values = values.reshape(image.size[1], image.size[0], -1)[::-1, :, :3]
    bpy.data.images.remove(image)
    return values


def exposure(linear: np.ndarray) -> float:
    """Stops that bring the geometric mean of the luminance to ``TARGET_GREY``.

    The brightest tenth counts as its lower bound, so that a window does not darken the room.
    """
    luminance = np.maximum(linear @ np.array([0.2126, 0.7152, 0.0722], np.float32), 1e-4)
    bounded = np.minimum(luminance, np.quantile(luminance, 0.9))
    return math.log2(TARGET_GREY / float(np.exp(np.log(bounded).mean())))
