// ---- Map ----
const canvas = find("#map"),
  X = unpack(m.x, Uint16Array),
  Y = unpack(m.y, Uint16Array);
find("#mapped p").textContent =
  `${m.whole ? "All " : ""}${plural(m.n, "sample")}${m.whole ? "" : " of the pool, up to half of them selected"}, ` +
  `by ${m.made_by} of their embeddings. Choose a point, or give a sample's id or key. Drag to move; pinch, the buttons, or Ctrl and the wheel zoom` +
  (data.tiles.image ? ", far enough to see images." : ".");
const kinds = [
  ["selection", "selected or not"],
  ...(labelOf ? [["class", "by class"]] : []),
  ...(clusters.length > 1 ? [["top", "by cluster of the top level"]] : []),
];
find("#colour").append(...kinds.map(([value, text]) => make("option", { value }, text)));
const top = new Int32Array(m.n).map((_, i) => {
  let at = leaf[i];
  if (at < 0) return -1;
  for (let l = 0; l + 1 < clusters.length; l++) at = clusters[l].parent[at];
  return clusters.at(-1).id[at];
});
const sheet = new Image();
sheet.onload = () => paint();
if (data.tiles.image) sheet.src = data.tiles.image;
let view = { x: 0, y: 0, zoom: 1 },
  pending = false;
const half = [m.aspect[0] / 2, m.aspect[1] / 2];
const position = i => [(X[i] - 1) / 65534 - half[0] + 0.5, 0.5 - ((Y[i] - 1) / 65534 - half[1])];
const toScreen = i => onScreen(...position(i));
function onScreen(x, y) {
  const side = canvas.clientWidth;
  return [
    ((x - 0.5 - view.x) * view.zoom * 0.94 + 0.5) * side,
    ((y - 0.5 - view.y) * view.zoom * 0.94 + 0.5) * side,
  ];
}
function paint() {
  if (pending) return;
  pending = true;
  requestAnimationFrame(() => {
    pending = false;
    const side = canvas.clientWidth,
      ratio = devicePixelRatio || 1;
    if (!side) return;
    if (canvas.width !== Math.round(side * ratio)) canvas.width = canvas.height = Math.round(side * ratio);
    const pen = canvas.getContext("2d"),
      style = getComputedStyle(root),
      mode = find("#colour").value;
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, side, side);
    const radius = Math.min(Math.max(1.1 * Math.sqrt(6000 / m.n) * Math.sqrt(view.zoom), 1), 6);
    const layer = (test, colour, size) => {
      pen.fillStyle = colour;
      for (let i = 0; i < m.n; i++) {
        if (!X[i] || !test(i)) continue;
        const [x, y] = toScreen(i);
        if (x < -9 || y < -9 || x > side + 9 || y > side + 9) continue;
        pen.beginPath();
        pen.arc(x, y, size, 0, 7);
        pen.fill();
      }
    };
    if (mode === "selection") {
      layer(i => !count[i], style.getPropertyValue("--faint"), radius);
      layer(i => count[i], style.getPropertyValue("--chosen"), radius * 1.15);
    } else {
      const group = mode === "class" ? labelOf : top;
      for (const [h, hue] of HUES.entries())
        layer(i => group[i] >= 0 && group[i] % HUES.length === h, hue, radius);
      nameGroups(pen, mode, group, side, style);
    }
    if (sheet.complete && sheet.naturalWidth && view.zoom >= 4) {
      const { size, columns } = data.tiles,
        edge = Math.min(16 + 2 * view.zoom, size);
      for (let i = 0, drawn = 0; i < m.n && drawn < 400; i++) {
        if (!X[i] || tileOf[i] < 0) continue;
        const [x, y] = toScreen(i);
        if (x < 0 || y < 0 || x > side || y > side) continue;
        pen.drawImage(
          sheet,
          size * (tileOf[i] % columns),
          size * Math.floor(tileOf[i] / columns),
          size,
          size,
          x - edge / 2,
          y - edge / 2,
          edge,
          edge,
        );
        pen.strokeStyle = style.getPropertyValue(count[i] ? "--chosen" : "--faint");
        pen.lineWidth = 2;
        pen.strokeRect(x - edge / 2, y - edge / 2, edge, edge);
        drawn++;
      }
    }
    if (current >= 0 && X[current]) {
      const [x, y] = toScreen(current);
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.lineWidth = 2;
      pen.beginPath();
      pen.arc(x, y, 9, 0, 7);
      pen.stroke();
    }
  });
  const hues = find("#hues"),
    mode = find("#colour").value;
  if (mode === "selection")
    legend(hues, ["not selected", "selected"], { "not selected": "var(--faint)", selected: "var(--chosen)" });
  else if (mode === "class" && data.classes.names.length <= HUES.length)
    legend(hues, data.classes.names, Object.fromEntries(data.classes.names.map((n, c) => [n, HUES[c]])));
  else
    hues.replaceChildren(
      `The largest are named on the map; each of the ${HUES.length} colours is of several ${mode === "class" ? "classes" : "clusters"}.`,
    );
}
// The largest groups are named where they lie; a name that would cover another is left out.
const centres = {};
function nameGroups(pen, mode, group, side, style) {
  centres[mode] ??= middles(group);
  pen.font = "600 12px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  const taken = [];
  for (const [g, x, y] of centres[mode]) {
    const [px, py] = onScreen(x, y),
      name = mode === "class" ? data.classes.names[g] : clusterName(clusters.length, g) || `cluster ${g}`;
    const text = name.length > 28 ? `${name.slice(0, 27)}…` : name,
      halfWidth = pen.measureText(text).width / 2 + 4;
    const cx = Math.min(Math.max(px, halfWidth), side - halfWidth);
    if (px < 0 || py < 0 || px > side || py > side) continue;
    if (taken.some(([x2, y2, w]) => Math.abs(x2 - cx) < w + halfWidth && Math.abs(y2 - py) < 16)) continue;
    taken.push([cx, py, halfWidth]);
    pen.lineWidth = 4;
    pen.strokeStyle = style.getPropertyValue("--card");
    pen.strokeText(text, cx, py);
    pen.fillStyle = style.getPropertyValue("--ink");
    pen.fillText(text, cx, py);
    if (taken.length === 24) break;
  }
}
function middles(group) {
  const members = new Map();
  for (let i = 0; i < m.n; i++) {
    if (!X[i] || group[i] < 0) continue;
    if (!members.has(group[i])) members.set(group[i], []);
    members.get(group[i]).push(i);
  }
  const middle = values => values.sort((a, b) => a - b)[values.length >> 1];
  return [...members]
    .sort((a, b) => b[1].length - a[1].length)
    .map(([g, all]) => [g, middle(all.map(i => position(i)[0])), middle(all.map(i => position(i)[1]))]);
}
function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientWidth / 2) {
  const side = canvas.clientWidth,
    next = Math.min(Math.max(view.zoom * factor, 1), 200),
    k = 0.94;
  view.x += ((x / side - 0.5) * (1 / view.zoom - 1 / next)) / k;
  view.y += ((y / side - 0.5) * (1 / view.zoom - 1 / next)) / k;
  view.zoom = next;
  touch();
  paint();
}
// A finger on the whole map scrolls the page; once there is something to move to, it moves the map.
const touch = () => {
  canvas.style.touchAction = view.zoom > 1 ? "none" : "pan-y";
};
function nearest(x, y, within = 24) {
  let best = -1,
    least = within * within;
  for (let i = 0; i < m.n; i++) {
    if (!X[i]) continue;
    const [px, py] = toScreen(i),
      d = (px - x) ** 2 + (py - y) ** 2;
    if (d < least) {
      least = d;
      best = i;
    }
  }
  return best;
}
function name(i) {
  find("#hover").textContent = i < 0 ? "" : `key ${m.keys[i]}, ${described(ids[i])}; ${REASONS[reasonOf(i)]}`;
}
const pointers = new Map();
let moved = 0;
canvas.addEventListener("pointerdown", event => {
  pointers.set(event.pointerId, event);
  canvas.setPointerCapture(event.pointerId);
  moved = 0;
});
canvas.addEventListener("pointermove", event => {
  const before = pointers.get(event.pointerId),
    side = canvas.clientWidth * view.zoom * 0.94;
  if (!before) {
    if (event.pointerType === "mouse") name(nearest(event.offsetX, event.offsetY));
    return;
  }
  const dx = event.clientX - before.clientX,
    dy = event.clientY - before.clientY;
  moved += Math.abs(dx) + Math.abs(dy);
  if (pointers.size === 2) {
    const other = [...pointers.values()].find(p => p.pointerId !== event.pointerId),
      frame = canvas.getBoundingClientRect();
    const length = p => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY) || 1;
    zoom(
      length(event) / length(before),
      (event.clientX + other.clientX) / 2 - frame.left,
      (event.clientY + other.clientY) / 2 - frame.top,
    );
    view.x -= dx / 2 / side;
    view.y -= dy / 2 / side;
  } else {
    view.x -= dx / side;
    view.y -= dy / side;
  }
  pointers.set(event.pointerId, event);
  paint();
});
for (const kind of ["pointerup", "pointercancel"])
  canvas.addEventListener(kind, event => {
    if (kind === "pointerup" && pointers.has(event.pointerId) && moved < 6) {
      const i = nearest(event.offsetX, event.offsetY);
      if (i >= 0) show(ids[i]);
    }
    pointers.delete(event.pointerId);
  });
canvas.addEventListener(
  "wheel",
  event => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 300), event.offsetX, event.offsetY);
  },
  { passive: false },
);
canvas.addEventListener("keydown", event => {
  const step = 0.1 / view.zoom,
    keys = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
  if (keys[event.key]) {
    view.x += keys[event.key][0];
    view.y += keys[event.key][1];
    paint();
    event.preventDefault();
  } else if (event.key === "Enter") {
    const i = nearest(canvas.clientWidth / 2, canvas.clientWidth / 2, Infinity);
    if (i >= 0) show(ids[i]);
  } else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
});
find("#in").onclick = () => zoom(1.6);
find("#out").onclick = () => zoom(1 / 1.6);
find("#whole").onclick = () => {
  view = { x: 0, y: 0, zoom: 1 };
  touch();
  paint();
};
find("#colour").onchange = paint;

// ---- Sections, theme, size, start ----
find("nav").append(
  ...[...document.querySelectorAll("section")].map(section =>
    make("a", { href: `#${section.id}` }, section.dataset.name),
  ),
);
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);
function named() {
  find("#theme").textContent = isDark() ? "Light" : "Dark";
  paint();
}
find("#theme").onclick = () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  named();
};
dark.addEventListener("change", named);
const redraw = () => {
  for (const draw of redraws) draw();
  paint();
};
let width = 0;
new ResizeObserver(() => {
  if (innerWidth !== width) {
    width = innerWidth;
    redraw();
  }
}).observe(document.body);
redraw();
named();
const asked = /^#sample=(\d+)$/.exec(location.hash);
const first = data.sheets.find(s => s.kept[0].length);
if (asked) show(Number(asked[1]), true);
else if (first) show(first.kept[0][0]);
root.dataset.ready = "yes";
