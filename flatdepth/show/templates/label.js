const find = (selector) => document.querySelector(selector);
const all = (selector) => [...document.querySelectorAll(selector)];
const stage = find("#stage");
const drawn = find("#drawn");
const labels = new Map(all("[data-label]").map((button) => [button.dataset.label, {
  title: button.textContent.trim(),
  colour: button.style.getPropertyValue("--own"),
}]));
const MEANINGS = JSON.parse(find("#things").dataset.meanings);
const FLAT = ["mirror", "picture", "screen"];
const CLICK_PX = 4;
const DOUBLE_MS = 400;

let states = [];
let current = -1;
let doc = null; // the photograph that is shown, its shapes and what the server said of them
let chosen = null; // key of the selected shape
let open = []; // corners of the outline that is being drawn
let tool = "draw";
let label = "mirror";
let layer = "photo";
let view = { scale: 1, x: 0, y: 0 }; // pixel (u, v) is at (x + scale u, y + scale v) of the stage
let hover = null;
let space = false;
let saves = 0;

// What the server knows.

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("flatdepth label does not answer; is it still running?");
  }
  const answer = await response.json();
  if (response.ok) return answer;
  throw Object.assign(new Error(answer.error), { status: response.status });
}

function say(text, bad = false) {
  find("#saved").textContent = text;
  find("#saved").classList.toggle("bad", bad);
}

async function show(number) {
  if (number < 0 || number >= states.length) return;
  current = number;
  [chosen, open, doc] = [null, [], null];
  find("#photo").removeAttribute("src");
  find("#depth").removeAttribute("src");
  say("");
  history.replaceState(null, "", `#${number + 1}`);
  render();
  let answer;
  try {
    answer = await ask(`photos/${number}`);
  } catch (error) {
    if (number === current) say(error.message, true);
    return;
  }
  if (number !== current) return;
  doc = { ...answer, number, past: [], future: [], things: null, asked: 0, saved: Promise.resolve() };
  doc.blocked = doc.trouble !== null;
  find("#photo").src = `photos/${number}/image`;
  find("#photo").style.width = find("#depth").style.width = `${doc.width}px`;
  find("#photo").style.height = find("#depth").style.height = `${doc.height}px`;
  find("#photo").alt = states[number].name;
  whole();
  fit();
}

function state(number, value) {
  states[number] = value;
  renderPhotos();
}

/** Saves one after the other, each over the version that the one before it has left. */
function save() {
  const mine = doc;
  if (mine.blocked) return;
  const shapes = structuredClone(mine.shapes);
  saves += 1;
  say("saving …");
  mine.saved = mine.saved.then(async () => {
    if (mine.blocked) return;
    try {
      const answer = await ask(`photos/${mine.number}`, { shapes, digest: mine.digest });
      mine.digest = answer.digest;
      state(mine.number, answer.state);
      if (mine === doc) say(answer.digest ? "saved" : "");
    } catch (error) {
      if (error.status === 409) Object.assign(mine, { blocked: true, mine: true, trouble: error.message });
      if (mine === doc) say(error.status === 409 ? "not saved" : `not saved: ${error.message}`, true);
    }
  }).finally(() => {
    saves -= 1;
    if (mine === doc) render();
  });
}

/** Asks for the planes; an answer that a later question has overtaken is dropped. */
async function fit() {
  const mine = doc;
  const asked = (mine.asked += 1);
  mine.waiting = true;
  render();
  await new Promise((go) => setTimeout(go, mine.things ? 60 : 300));
  if (asked !== mine.asked || mine !== doc) return;
  let answer;
  try {
    answer = await ask(`photos/${mine.number}/planes`, { shapes: mine.shapes, digest: null });
  } catch (error) {
    if (asked === mine.asked && mine === doc) {
      mine.waiting = false;
      say(error.message, true);
      render();
    }
    return;
  }
  if (asked !== mine.asked) return;
  mine.waiting = false;
  mine.things = new Map(answer.things.map((one) => [mine.shapes[one.place].key, one]));
  Object.assign(mine, { planed: answer.planed, about: answer });
  state(mine.number, answer.state);
  if (mine === doc) render();
}

async function settle(action) {
  const mine = doc;
  try {
    if (action === "reload") return show(mine.number);
    await ask(`photos/${mine.number}/aside`, {});
    Object.assign(mine, { digest: null, blocked: false, trouble: null });
    save();
  } catch (error) {
    mine.trouble = error.message;
  }
  return render();
}

// Changes.

function change(shapes) {
  if (!doc || (doc.blocked && !doc.mine)) return;
  doc.past.push(doc.shapes);
  doc.future = [];
  doc.shapes = shapes;
  save();
  fit();
}

function travel(from, to) {
  if (!doc || open.length || !doc[from].length) return;
  doc[to].push(doc.shapes);
  doc.shapes = doc[from].pop();
  if (!shape(chosen)) chosen = null;
  save();
  fit();
}

const shape = (key) => doc?.shapes.find((one) => one.key === key);
const outlines = () => (doc ? doc.shapes.filter((one) => one.corners) : []);
const replaced = (key, values) => doc.shapes.map((one) => (one.key === key ? { ...one, ...values } : one));

function add(corners) {
  open = [];
  if (area(corners) < 4) return render();
  const key = `new ${crypto.randomUUID()}`;
  chosen = key;
  return change([...doc.shapes, { key, label, kind: "polygon", corners }]);
}

function area(corners) {
  let twice = 0;
  corners.forEach(([u, v], i) => {
    const [a, b] = corners[(i + 1) % corners.length];
    twice += u * b - a * v;
  });
  return Math.abs(twice) / 2;
}

function remove(key) {
  if (!shape(key)) return;
  if (chosen === key) chosen = null;
  change(doc.shapes.filter((one) => one.key !== key));
}

/** Brings an outline past its next neighbour among the outlines. */
function reorder(key, step) {
  const order = outlines();
  const other = order[order.findIndex((one) => one.key === key) + step];
  if (!other) return;
  const shapes = doc.shapes.filter((one) => one.key !== key);
  const at = shapes.indexOf(other) + (step > 0 ? 1 : 0);
  change([...shapes.slice(0, at), shape(key), ...shapes.slice(at)]);
}

/** What is drawn next; with the tool that moves also what the selected outline is. */
function pick(name) {
  label = name;
  if (tool === "move") relabel(name);
  render();
}

function relabel(name) {
  const one = shape(chosen);
  if (one && one.label !== name) change(replaced(chosen, { label: name }));
}

// Where things are.

const toPhoto = ([x, y]) => [(x - view.x) / view.scale, (y - view.y) / view.scale];
const toStage = ([u, v]) => [view.x + view.scale * u, view.y + view.scale * v];
const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
const tidy = (value, most) => Math.round(Math.min(Math.max(value, 0), most) * 100) / 100;
const inPhoto = ([u, v]) => [tidy(u, doc.width), tidy(v, doc.height)];
const middle = (a, b) => [(a[0] + b[0]) / 2, (a[1] + b[1]) / 2];

function at(event) {
  const box = stage.getBoundingClientRect();
  return [event.clientX - box.x, event.clientY - box.y];
}

function contains(corners, [u, v]) {
  let inside = false;
  corners.forEach(([a, b], i) => {
    const [c, d] = corners[(i + 1) % corners.length];
    if (b > v !== d > v && u < a + ((v - b) / (d - b)) * (c - a)) inside = !inside;
  });
  return inside;
}

const under = (place) => outlines().findLast((one) => contains(one.corners, toPhoto(place)));

/** The corner, or the middle of a side, of the selected outline at a place. */
function handle(place, reach) {
  const corners = shape(chosen)?.corners;
  if (!corners) return null;
  const near = (point) => distance(toStage(point), place) <= reach;
  const corner = corners.findIndex(near);
  if (corner >= 0) return { corner };
  const between = corners.findIndex((one, i) => near(middle(one, corners[(i + 1) % corners.length])));
  return between >= 0 ? { between } : null;
}

function zoom(factor, place) {
  if (!doc) return;
  const scale = Math.min(Math.max(view.scale * factor, fitting() / 2), Math.max(20, fitting()));
  const [u, v] = toPhoto(place);
  view = { scale, x: place[0] - scale * u, y: place[1] - scale * v };
  paint();
}

const fitting = () => Math.min(stage.clientWidth / doc.width, stage.clientHeight / doc.height);

function whole() {
  if (!doc) return;
  const scale = fitting() * 0.96;
  view = {
    scale,
    x: (stage.clientWidth - scale * doc.width) / 2,
    y: (stage.clientHeight - scale * doc.height) / 2,
  };
  render();
}

const zoomMiddle = (factor) => zoom(factor, [stage.clientWidth / 2, stage.clientHeight / 2]);

// Pointers: one draws, two zoom.

const fingers = new Map();
let gesture = null;
let lastClick = { time: 0, place: [0, 0] };

stage.addEventListener("pointerdown", (event) => {
  if (!doc || event.target.closest("button")) return;
  stage.setPointerCapture(event.pointerId);
  stage.focus({ preventScroll: true });
  const place = at(event);
  fingers.set(event.pointerId, place);
  if (fingers.size === 2) {
    gesture = { kind: "pinch" };
    return;
  }
  if (fingers.size > 2 || event.button === 2) return;
  gesture = begin(event, place);
  hover = place;
  paint();
});

function begin(event, start) {
  const reach = event.pointerType === "touch" ? 22 : 9;
  const common = { start, view: { ...view }, moved: false, reach };
  if (event.button === 1 || space) return { kind: "pan", ...common };
  if (doc.blocked && !doc.mine) return { kind: "pan", ...common };
  if (open.length) return { kind: "corner", ...common };
  const grip = handle(start, reach);
  if (grip) {
    const corners = structuredClone(shape(chosen).corners);
    if ("between" in grip) {
      corners.splice(grip.between + 1, 0, inPhoto(toPhoto(start)));
      return { kind: "drag", index: grip.between + 1, corners, inserted: true, ...common };
    }
    return { kind: "drag", index: grip.corner, corners, ...common };
  }
  if (tool === "draw") return { kind: "draw", ...common };
  const hit = under(start);
  chosen = hit?.key ?? null;
  if (!hit) return { kind: "pan", ...common };
  label = labels.has(hit.label) ? hit.label : label;
  return { kind: "shift", before: hit.corners, corners: hit.corners, ...common };
}

stage.addEventListener("pointermove", (event) => {
  if (!doc) return;
  const place = at(event);
  hover = event.pointerType === "touch" && !fingers.size ? null : place;
  if (!fingers.has(event.pointerId)) return paint();
  const before = [...fingers.values()];
  fingers.set(event.pointerId, place);
  if (gesture?.kind === "pinch" && fingers.size === 2) {
    const after = [...fingers.values()];
    const [from, to] = [middle(...before), middle(...after)];
    view.x += to[0] - from[0];
    view.y += to[1] - from[1];
    return zoom(distance(...after) / Math.max(distance(...before), 1), to);
  }
  if (!gesture || gesture.kind === "pinch") return undefined;
  gesture.moved ||= distance(place, gesture.start) > CLICK_PX;
  if (!gesture.moved) return undefined;
  const by = [place[0] - gesture.start[0], place[1] - gesture.start[1]];
  if (gesture.kind === "pan") view = { ...view, x: gesture.view.x + by[0], y: gesture.view.y + by[1] };
  if (gesture.kind === "drag") gesture.corners[gesture.index] = inPhoto(toPhoto(place));
  if (gesture.kind === "shift") gesture.corners = shifted(gesture.before, by);
  return paint();
});

/** The corners moved, as far as the photograph goes. */
function shifted(corners, by) {
  const [du, dv] = [0, 1].map((axis) => {
    const values = corners.map((corner) => corner[axis]);
    const most = axis ? doc.height : doc.width;
    const [low, high] = [-Math.min(...values), most - Math.max(...values)];
    return low > high ? 0 : Math.min(Math.max(by[axis] / view.scale, low), high);
  });
  return corners.map(([u, v]) => inPhoto([u + du, v + dv]));
}

stage.addEventListener("pointerup", (event) => {
  const place = at(event);
  const done = gesture;
  fingers.delete(event.pointerId);
  if (!fingers.size) gesture = null;
  if (event.pointerType === "touch") hover = null;
  if (!doc || !done || fingers.size || done.kind === "pinch") return render();
  if (done.kind === "draw" && done.moved) return add(box(done.start, place));
  if (done.kind === "draw" || done.kind === "corner") return corner(place, done.reach);
  if (done.kind === "drag" && (done.moved || done.inserted)) {
    return change(replaced(chosen, { corners: done.corners }));
  }
  if (done.kind === "shift" && done.moved) return change(replaced(chosen, { corners: done.corners }));
  return render();
});

stage.addEventListener("pointercancel", (event) => {
  fingers.delete(event.pointerId);
  gesture = null;
  render();
});

stage.addEventListener("pointerleave", () => {
  hover = null;
  paint();
});

stage.addEventListener("contextmenu", (event) => event.preventDefault());

stage.addEventListener("wheel", (event) => {
  event.preventDefault();
  const lines = event.deltaMode === 1 ? 18 : 1;
  zoom(Math.exp(-event.deltaY * lines * 0.0016), at(event));
}, { passive: false });

function box(a, b) {
  const [[u, v], [s, t]] = [inPhoto(toPhoto(a)), inPhoto(toPhoto(b))];
  const [left, right, top, bottom] = [Math.min(u, s), Math.max(u, s), Math.min(v, t), Math.max(v, t)];
  return [[left, top], [right, top], [right, bottom], [left, bottom]];
}

function corner(place, reach) {
  const now = performance.now();
  const double = now - lastClick.time < DOUBLE_MS && distance(place, lastClick.place) < reach;
  lastClick = { time: now, place };
  const closes = double || (open.length > 2 && distance(toStage(open[0]), place) <= reach);
  if (open.length > 2 && closes) return add(open);
  if (!open.length) chosen = null;
  if (!double || !open.length) open.push(inPhoto(toPhoto(place)));
  return render();
}

// Buttons and keys.

const actions = {
  previous: () => show(current - 1),
  next: () => show(current + 1),
  undo: () => travel("past", "future"),
  redo: () => travel("future", "past"),
  smaller: () => zoomMiddle(1 / 1.4),
  larger: () => zoomMiddle(1.4),
  whole,
  close: () => (open.length > 2 ? add(open) : undefined),
  corner: () => {
    open.pop();
    render();
  },
  cancel: () => {
    if (!open.length) chosen = null;
    open = [];
    gesture = null;
    render();
  },
  reload: () => settle("reload"),
  aside: () => settle("aside"),
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const { dataset } = button;
  if (dataset.do) actions[dataset.do]();
  if (dataset.label) pick(dataset.label);
  if (dataset.tool) choose({ tool: dataset.tool });
  if (dataset.layer) choose({ layer: dataset.layer });
});

function choose(values) {
  if (values.tool) tool = values.tool;
  if (values.layer) layer = values.layer;
  render();
}

const KEYS = {
  Enter: () => actions.close(),
  Escape: () => actions.cancel(),
  Backspace: () => (open.length ? actions.corner() : remove(chosen)),
  Delete: () => remove(chosen),
  "[": () => reorder(chosen, -1),
  "]": () => reorder(chosen, 1),
  ArrowLeft: () => actions.previous(),
  ArrowRight: () => actions.next(),
  d: () => choose({ tool: "draw" }),
  v: () => choose({ tool: "move" }),
  0: whole,
  "+": () => actions.larger(),
  "=": () => actions.larger(),
  "-": () => actions.smaller(),
};
[...labels.keys()].forEach((name, i) => { KEYS[i + 1] = () => pick(name); });

document.addEventListener("keydown", (event) => {
  if (event.target.closest("select, input")) return;
  if (event.ctrlKey || event.metaKey) {
    const key = event.key.toLowerCase();
    if (key !== "z" && key !== "y") return;
    event.preventDefault();
    actions[key === "y" || event.shiftKey ? "redo" : "undo"]();
    return;
  }
  if (event.key === " ") {
    if (event.target.closest("button, summary")) return;
    space = true;
    event.preventDefault();
    return;
  }
  if (event.key === "Enter" && event.target.closest("button, summary")) return;
  const grip = event.altKey && event.key === "Delete" && hover && handle(hover, 12);
  if (grip && "corner" in grip && shape(chosen).corners.length > 3) {
    change(replaced(chosen, { corners: shape(chosen).corners.filter((_, i) => i !== grip.corner) }));
    return;
  }
  const action = event.altKey ? null : KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

document.addEventListener("keyup", (event) => {
  if (event.key === " ") space = false;
});

addEventListener("beforeunload", (event) => {
  if (saves) event.preventDefault();
});

find("#opacity").addEventListener("input", () => paint());
new ResizeObserver(() => whole()).observe(stage);

// What is seen.

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function svg(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const colourOf = (name) => labels.get(meaning(name))?.colour ?? "rgb(150, 156, 164)";
const meaning = (name) => MEANINGS[name.trim().toLowerCase()];
const trouble = (key) => doc.things?.get(key)?.trouble;

function pathOf(corners, closed) {
  return `M${corners.map((one) => toStage(one).map((x) => x.toFixed(1)).join(" ")).join("L")}${closed ? "Z" : ""}`;
}

function lines(colour, corners, { closed = true, mark = "" } = {}) {
  const group = svg("g", { class: mark, style: `--own: ${colour}` });
  const d = pathOf(corners, closed);
  group.append(svg("path", { d, class: "rim" }), svg("path", { d }));
  return group;
}

/** The photograph and what is drawn on it. */
function paint() {
  if (!doc) return drawn.replaceChildren();
  const place = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
  const depth = find("#depth");
  find("#photo").style.transform = depth.style.transform = place;
  const source = layer === "planed" ? doc.planed : layer === "depth" ? `photos/${doc.number}/depth` : null;
  depth.hidden = !source || !doc.planed;
  if (!depth.hidden && depth.getAttribute("src") !== source) depth.src = source;
  depth.style.opacity = find("#opacity").value / 100;

  const parts = [];
  outlines().forEach((one, i) => {
    const active = one.key === chosen;
    const dragged = active && gesture?.corners && gesture.kind !== "pinch";
    const corners = dragged ? gesture.corners : one.corners;
    const group = lines(colourOf(one.label), corners, { mark: active ? "chosen" : "" });
    const name = labels.get(meaning(one.label))?.title ?? one.label;
    // a frame is named below, what hangs in it at its upper left corner
    const low = meaning(one.label) === "frame" ? -1 : 1;
    const [x, y] = toStage(corners.reduce((a, b) => (b[0] + low * b[1] < a[0] + low * a[1] ? b : a)));
    group.append(svg("text", { x: x + (low > 0 ? 7 : 0), y: y + 18 }, `${i + 1} ${name}${trouble(one.key) ? " ⚠" : ""}`));
    parts.push(group);
    if (!active || open.length) return;
    corners.forEach((a, n) => {
      const b = corners[(n + 1) % corners.length];
      if (distance(toStage(a), toStage(b)) > 36) {
        const [cx, cy] = toStage(middle(a, b));
        group.append(svg("circle", { cx, cy, r: 3.5, class: "between" }));
      }
    });
    for (const [cx, cy] of corners.map(toStage)) group.append(svg("circle", { cx, cy, r: 5.5 }));
  });
  if (gesture?.kind === "draw" && gesture.moved && hover) {
    parts.push(lines(colourOf(label), box(gesture.start, hover), { mark: "open" }));
  }
  if (open.length) {
    const ahead = hover ? [...open, toPhoto(hover)] : open;
    const group = lines(colourOf(label), ahead, { closed: false, mark: "open" });
    for (const [cx, cy] of open.map(toStage)) group.append(svg("circle", { cx, cy, r: 5 }));
    parts.push(group);
  }
  drawn.replaceChildren(...parts);
  drawn.classList.toggle("clear", !depth.hidden);
  stage.classList.toggle("move", tool === "move");
  stage.classList.toggle("pan", gesture?.kind === "pan" || space);
  const over = hover && !open.length && !gesture && (handle(hover, 9) || (tool === "move" && under(hover)));
  stage.classList.toggle("over", Boolean(over));
  return undefined;
}

function renderPhotos() {
  const rows = states.map((one, number) => {
    const light = one.trouble ? "trouble" : one.outlines ? "ok" : "";
    const things = `${one.things} thing${one.things === 1 ? "" : "s"}`;
    const words = one.trouble && !one.outlines ? "trouble" : one.things ? things
      : one.outlines ? "no flat thing" : "unlabelled";
    const button = element("button", { type: "button", title: one.trouble ?? one.name },
      element("i", { class: `light ${light}` }), element("b", {}, one.name),
      element("small", {}, one.trouble && one.outlines ? `${words}, trouble` : words));
    button.setAttribute("aria-current", number === current);
    button.addEventListener("click", () => show(number));
    return element("li", {}, button);
  });
  const place = find("#photos");
  const focused = [...place.children].findIndex((row) => row.contains(document.activeElement));
  place.replaceChildren(...rows);
  if (focused >= 0) rows[focused].firstChild.focus({ preventScroll: true });
  rows[current]?.scrollIntoView({ block: "nearest", inline: "nearest" });
}

const percent = (share) => `${(100 * share).toFixed(Math.abs(share) < 0.0995 ? 1 : 0)} %`;
const metres = (value) => `${value.toFixed(value < 1 ? 2 : 1)} m`;

function verdict(one) {
  const known = doc.things?.get(one.key);
  const wait = doc.waiting;
  const line = (kind, text) => element("p", { class: `verdict ${kind}` },
    element("i", { class: `light ${kind}` }), text);
  if (!labels.has(meaning(one.label))) return line("trouble", "a label that is not used");
  if (!FLAT.includes(meaning(one.label))) {
    return line("plain", { frame: "is left out of the fit", opening: "keeps the depth seen in it",
      object: "is cut out of what it covers" }[meaning(one.label)]);
  }
  if (!known) return line("wait", wait ? "predicting the depth …" : "nothing of it, or one thing with another");
  if (known.trouble) return line("trouble", known.trouble);
  const distance = known.distance === null ? "" : `, ${metres(known.distance)} away`;
  return line("ok", `a plane to ${percent(known.residual)}${distance}`);
}

function numbers(thing) {
  const list = element("dl", { class: "numbers" });
  const row = (name, value, title) => {
    list.append(element("dt", { title }, name), element("dd", {}, value));
  };
  if (thing.residual === null) return list;
  row("Residual", percent(thing.residual), "how far the points around it are from the plane, in depth");
  row("On the plane", percent(thing.share), "share of what surrounds it");
  row("Uncertainty", percent(thing.uncertainty), "of the plane's depth inside the outline");
  if (thing.distance !== null) {
    row("Distance", `${thing.distance.toFixed(2)} m`, "depth of the plane in its middle");
    row("Turned", `${Math.round(thing.tilt_deg)}°`, "from facing the camera");
  }
  if (thing.excess !== null) {
    const nearer = thing.excess < 0;
    row("Seen", `${percent(Math.abs(thing.excess))} ${nearer ? "nearer" : "farther"}`,
      "than its plane by the model: the illusion");
  }
  return list;
}

/** The thing in section: from above, the camera below; from the side, the camera on the left. */
function section(thing) {
  const { seen_from: from, on_plane: near, off_plane: off, seen, thing: ends } = thing.section;
  const above = from === "above";
  const [width, height] = [320, 230];
  const flat = ([t, z]) => (above ? [t, -z] : [z, t]);
  const quantile = (values, q) => [...values].sort((a, b) => a - b)[Math.floor(q * (values.length - 1))];
  const reach = Math.max(...ends.map(([, z]) => z));
  const cap = 2 * reach;
  const kept = [...near, ...off, ...seen].filter(([, z]) => z < cap);
  const span = (axis, pick) => {
    const values = kept.map((one) => flat(one)[axis]);
    const fixed = [...ends.map((one) => flat(one)[axis]), 0];
    return pick(quantile(values, pick === Math.min ? 0.01 : 0.99), ...fixed);
  };
  const low = [span(0, Math.min), span(1, Math.min)];
  const high = [span(0, Math.max), span(1, Math.max)];
  const margin = 14;
  const scale = Math.min((width - 2 * margin) / Math.max(high[0] - low[0], 1e-6),
    (height - 2 * margin) / Math.max(high[1] - low[1], 1e-6));
  const shift = [0, 1].map((i) => [width, height][i] / 2 - (scale * (low[i] + high[i])) / 2);
  const put = (point) => flat(point).map((x, i) => x * scale + shift[i]);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `The outline and what is around it, seen from ${from}` });
  const camera = put([0, 0]);
  const line = (a, b, mark) => svg("line", { x1: a[0], y1: a[1], x2: b[0], y2: b[1], class: mark });
  for (const end of ends) picture.append(line(camera, put(end), "sight"));
  const dots = (points, mark) => {
    for (const [cx, cy] of points.map(put)) {
      picture.append(svg("circle", { cx: cx.toFixed(1), cy: cy.toFixed(1), r: 1.7, class: mark }));
    }
  };
  dots(off, "off");
  dots(seen, "seen");
  dots(near, "around");
  const [a, b] = ends.map(put);
  const long = Math.max(distance(a, b), 1);
  const way = [(b[0] - a[0]) / long, (b[1] - a[1]) / long];
  const far = long * 0.6 + 20;
  picture.append(line([a[0] - way[0] * far, a[1] - way[1] * far],
    [b[0] + way[0] * far, b[1] + way[1] * far], "reach"), line(a, b, "plane"));
  picture.append(svg("circle", { cx: camera[0], cy: camera[1], r: 4, class: "off" }));
  picture.append(svg("text", { x: camera[0] + 8, y: camera[1] + (above ? 3 : -8) }, "camera"));
  if (doc.about.metric) {
    const length = [10, 5, 2, 1, 0.5, 0.2, 0.1].find((one) => one * scale < width / 3) ?? 0.1;
    const x = camera[0] > width / 2 ? margin : width - margin - length * scale;
    picture.append(svg("path", { class: "ruler", d: `M${x} ${height - 12}v5h${length * scale}v-5` }),
      svg("text", { x, y: height - 16 }, `${length} m`));
  }
  const key = element("p", { class: "key" });
  const entry = (colour, text, line = "") => key.append(element("span", {},
    element("i", { style: `--dot: ${colour}`, class: line }), text));
  entry("var(--ink)", "its plane", "line");
  entry("var(--away)", "what the model sees in it");
  entry("var(--wall)", "around it, on the plane");
  if (off.length) entry("var(--muted)", "around it, off the plane");
  key.append(element("span", {}, `Seen from ${from}${doc.about.metric ? "." : "; its units are arbitrary."}`));
  return element("div", { class: "section" }, picture, key);
}

function card(one, i) {
  const active = one.key === chosen;
  const kinds = [...labels].map(([value, { title }]) => element("option", { value }, title));
  if (!labels.has(one.label)) kinds.push(element("option", { value: one.label }, one.label));
  const select = element("select", { "aria-label": `What outline ${i + 1} is` }, ...kinds);
  select.value = one.label;
  select.addEventListener("change", () => {
    select.blur();
    chosen = one.key;
    relabel(select.value);
  });
  select.addEventListener("blur", () => render()); // an open list is left as it is
  const button = (text, title, action, mark = "") => {
    const made = element("button", { type: "button", title, "aria-label": `${title}: outline ${i + 1}`, class: mark }, text);
    made.addEventListener("click", action);
    return made;
  };
  const toggle = () => {
    chosen = active ? null : one.key;
    render();
  };
  const head = element("div", { class: "head" },
    element("i", { class: "swatch", style: `--own: ${colourOf(one.label)}` }),
    button(`${i + 1}`, "Select", toggle, "pick"), select,
    button("▲", "In front", () => reorder(one.key, 1)),
    button("▼", "Behind", () => reorder(one.key, -1)),
    button("✕", "Remove", () => remove(one.key)));
  const whole = element("div", { class: active ? "thing chosen" : "thing" }, head, verdict(one));
  const thing = doc.things?.get(one.key);
  if (active && thing) {
    whole.append(numbers(thing));
    if (thing.section) whole.append(section(thing));
  }
  return whole;
}

function renderBanner() {
  const banner = find("#banner");
  banner.hidden = !doc?.trouble;
  if (!doc?.trouble) return;
  banner.querySelector("p").textContent = doc.trouble;
  banner.querySelector('[data-do="reload"]').textContent = doc.mine ? "Take the file's outlines" : "Look again";
  banner.querySelector('[data-do="aside"]').textContent = doc.mine
    ? "Set the file aside, keep mine" : "Set the file aside, begin anew";
}

function hint() {
  if (!doc) return states.length ? "opening …" : "";
  if (doc.blocked && !doc.mine) return "nothing is drawn here until the file is settled";
  if (open.length === 1) return "click the next corners";
  if (open.length === 2) return "at least one more corner";
  if (open.length) return "double click, Enter or the first corner closes";
  if (tool === "draw" && !outlines().length) return `click the corners of a ${labels.get(label).title.toLowerCase()}, or drag a rectangle`;
  return "";
}

function render() {
  renderPhotos();
  renderBanner();
  find("#name").textContent = current < 0 ? "" : `${states[current].name}  ${current + 1}/${states.length}`;
  find('[data-do="previous"]').disabled = current <= 0;
  find('[data-do="next"]').disabled = current >= states.length - 1;
  find('[data-do="undo"]').disabled = !doc?.past.length;
  find('[data-do="redo"]').disabled = !doc?.future.length;
  find('[data-do="close"]').disabled = open.length < 3;
  for (const [name, value] of Object.entries({ tool, label, layer })) {
    for (const button of all(`[data-${name}]`)) {
      button.setAttribute("aria-pressed", button.dataset[name] === value);
    }
  }
  find(".under").classList.toggle("plain", layer === "photo");
  find("#drawing").hidden = !open.length;
  find("#hint").textContent = hint();
  const cards = outlines().map(card).reverse();
  const others = doc ? doc.shapes.filter((one) => !one.corners) : [];
  if (doc && !cards.length) {
    cards.push(element("p", { class: "empty" }, doc.waiting ? "No outlines yet. Predicting the depth …" : "No outlines yet."));
  }
  for (const one of others) {
    cards.push(element("div", { class: "thing" }, element("div", { class: "head" },
      element("i", { class: "swatch", style: `--own: ${colourOf(one.label)}` }),
      `${one.label}, ${one.kind}: kept as it is`), verdict(one)));
  }
  const place = find("#things");
  const focused = place.contains(document.activeElement) ? document.activeElement : null;
  if (!focused?.matches("select")) {
    place.replaceChildren(...cards);
    const name = focused?.getAttribute("aria-label");
    all("#things button").find((one) => one.getAttribute("aria-label") === name)?.focus();
  }
  const about = doc?.about;
  find("#camera").textContent = about ? `Camera: ${about.camera}.${about.metric ? "" : " The model's depth is relative: its units are arbitrary, angles and distances are not known."}` : "";
  find("#near").textContent = about?.metric ? metres(about.limits[0]) : "near";
  find("#far").textContent = about?.metric ? `${metres(about.limits[1])} or more` : "far";
  paint();
}

ask("photos").then((answer) => {
  states = answer;
  render();
  const wanted = Number(location.hash.slice(1)) - 1;
  show(states[wanted] ? wanted : 0);
}, (error) => say(error.message, true));
