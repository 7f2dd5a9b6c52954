"use strict";
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const VIEWS = { front: [0, 0], side: [-0.5, 0.22], above: [0, 1.3] };

function unpack(cloud) {
  const { width, height, inverse: k, step, unit, pivot } = cloud;
  const maps = {};
  for (const [name, text] of Object.entries(cloud.maps)) {
    const code = new Uint16Array(bytes(text).buffer);
    const points = new Float32Array(3 * code.length);
    for (let i = 0; i < code.length; i++) {
      const u = cloud.first[0] + step * (i % width);
      const v = cloud.first[1] + step * Math.floor(i / width);
      const z = code[i] ? code[i] * unit : NaN;
      points[3 * i] = (k[0] * u + k[1] * v + k[2]) * z;
      points[3 * i + 1] = (k[3] * u + k[4] * v + k[5]) * z;
      points[3 * i + 2] = z - pivot;
    }
    maps[name] = points;
  }
  return { maps, rgb: bytes(cloud.rgb), pivot, focal: 1 / k[0] / step, width, height };
}

function draw(canvas, cloud, points, camera) {
  const ratio = Math.min(window.devicePixelRatio || 1, 2);
  const width = (canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio)));
  const height = (canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio)));
  // the pixels are made here, so the canvas is best kept off the graphics card
  const context = canvas.getContext("2d", { willReadFrequently: true });
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const nearest = new Float32Array(width * height).fill(Infinity);
  const [cy, sy] = [Math.cos(camera.yaw), Math.sin(camera.yaw)];
  const [cp, sp] = [Math.cos(camera.pitch), Math.sin(camera.pitch)];
  const focal = cloud.focal * (width / cloud.width) * camera.zoom;
  const grain = focal / cloud.focal;
  const rgb = cloud.rgb;
  for (let i = 0, j = 0; i < points.length; i += 3, j += 3) {
    const x = cy * points[i] + sy * points[i + 2];
    const zy = cy * points[i + 2] - sy * points[i];
    const y = cp * points[i + 1] - sp * zy;
    const z = sp * points[i + 1] + cp * zy + cloud.pivot;
    if (!(z > 0.05)) continue;
    const spread = (1.25 * grain * (points[i + 2] + cloud.pivot)) / z;
    const size = Math.min(12, Math.max(1, Math.ceil(spread)));
    const left = Math.round((focal * x) / z + width / 2 - size / 2);
    const top = Math.round((focal * y) / z + height / 2 - size / 2);
    const colour = 0xff000000 | (rgb[j + 2] << 16) | (rgb[j + 1] << 8) | rgb[j];
    for (let r = Math.max(0, top); r < Math.min(height, top + size); r++) {
      for (let c = Math.max(0, left); c < Math.min(width, left + size); c++) {
        const at = r * width + c;
        if (z < nearest[at]) {
          nearest[at] = z;
          pixels[at] = colour;
        }
      }
    }
  }
  context.putImageData(image, 0, 0);
}

for (const group of document.querySelectorAll(".cloud")) {
  const cloud = unpack(JSON.parse(group.querySelector("script").textContent));
  const camera = { yaw: VIEWS.side[0], pitch: VIEWS.side[1], zoom: 0.8 };
  const views = [...group.querySelectorAll("canvas")];
  let waiting = false;
  const redraw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      for (const view of views) draw(view, cloud, cloud.maps[view.dataset.map], camera);
    });
  };
  const turn = (yaw, pitch) => {
    camera.yaw += yaw;
    camera.pitch = Math.max(-1.5, Math.min(1.5, camera.pitch + pitch));
    redraw();
  };
  const zoom = (factor) => {
    camera.zoom = Math.max(0.2, Math.min(8, camera.zoom * factor));
    redraw();
  };
  for (const view of views) {
    view.style.aspectRatio = `${cloud.width} / ${cloud.height}`;
    view.addEventListener("pointerdown", (event) => view.setPointerCapture(event.pointerId));
    view.addEventListener("pointermove", (event) => {
      if (event.buttons) turn(event.movementX / 150, event.movementY / 150);
    });
    view.addEventListener(
      "wheel",
      (event) => {
        if (!event.ctrlKey && document.activeElement !== view) return;
        event.preventDefault();
        zoom(Math.exp(-event.deltaY / 500));
      },
      { passive: false },
    );
    view.addEventListener("keydown", (event) => {
      const turns = {
        ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, -0.1], ArrowDown: [0, 0.1],
      };
      const zooms = { "+": 1.15, "-": 1 / 1.15 };
      if (turns[event.key]) turn(...turns[event.key]);
      else if (zooms[event.key]) zoom(zooms[event.key]);
      else return;
      event.preventDefault();
    });
  }
  for (const button of group.querySelectorAll("button")) {
    button.addEventListener("click", () => {
      [camera.yaw, camera.pitch] = VIEWS[button.dataset.view];
      camera.zoom = 0.8;
      redraw();
    });
  }
  for (const select of group.querySelectorAll("select")) {
    select.addEventListener("change", () => {
      for (const view of views) view.dataset.map = select.value;
      redraw();
    });
  }
  new ResizeObserver(redraw).observe(group);
  redraw();
}
