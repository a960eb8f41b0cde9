const root = document.documentElement;
const data = JSON.parse(document.getElementById("data").textContent);
const find = (selector, within = document) => within.querySelector(selector);
const whole = value => Math.round(value).toLocaleString("en");
const short = value =>
  value >= 100
    ? whole(value)
    : Number(value)
        .toPrecision(3)
        .replace(/\.?0+$/, "");
const percent = value =>
  `${
    value > 0 && value < 0.001
      ? (100 * value).toPrecision(1)
      : (100 * value).toFixed(value > 0 && value < 0.1 ? 1 : 0)
  }\u00a0%`;
const plural = (n, one, more = "s") => `${whole(n)} ${one}${n === 1 ? "" : more}`;
const COLOURS = { pool: "var(--pool)", random: "var(--chance)", selected: "var(--chosen)" };
// Okabe and Ito's colours, which the colour-blind can tell apart; groups are named on the map as well.
const HUES = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#b8a800", "#7f7f7f"];
const clusterName = (level, id) => data.names[level - 1]?.[id] ?? "";
const clusterText = (level, id) =>
  `cluster ${id}${clusterName(level, id) ? ` (${clusterName(level, id)})` : ""}`;

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes))
    if (key === "style") element.style.cssText = value;
    else if (key in element) element[key] = value;
    else element.setAttribute(key, value);
  element.append(...children);
  return element;
}
function table(head, rows, kind = "") {
  return make(
    "table",
    { className: kind },
    make("thead", {}, make("tr", {}, ...head.map(text => make("th", {}, text)))),
    make(
      "tbody",
      {},
      ...rows.map(row =>
        make(
          "tr",
          {},
          ...row.map((text, column) => make("td", { "data-label": head[column] }, String(text))),
        ),
      ),
    ),
  );
}
function unpack(text, kind) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new kind(bytes.buffer);
}
function legend(element, names, colours = COLOURS) {
  element.replaceChildren(
    ...names.map(name => {
      const mark = make("i");
      mark.style.background = colours[name];
      return make("span", {}, mark, name);
    }),
  );
}

// ---- Overview ----
document.title = data.title;
find("h1").textContent = data.title;
const low = data.levels[0];
find("#subtitle").textContent =
  `${plural(data.selected, "sample")} selected from ${whole(data.pool.samples)} in ${plural(data.pool.shards, "shard")} ` +
  `(${data.pool.first}${data.pool.shards > 1 ? ", …" : ""})` +
  (data.embedder ? `, by the features of ${data.embedder}` : "") +
  (data.unique < data.selected ? `; ${whole(data.unique)} different ones, the rest are repeats.` : ".");
const summary = [
  [whole(data.pool.samples), "samples in the pool"],
  [whole(data.failed), "failed to decode or embed"],
  ...(data.equal
    ? [
        [
          whole(data.equal.largest),
          `of ${whole(data.equal.looked_at)} embeddings looked at are one and the same`,
        ],
      ]
    : []),
  ...(data.filters ? [[whole(data.filters.dropped), "dropped by filters"]] : []),
  ...(data.excluded ? [[whole(data.excluded), "left out of the clustering: their embeddings are zero"]] : []),
  ...(data.duplicates
    ? [
        [
          whole(data.duplicates.removed + data.duplicates.held_out),
          "near-duplicates left out" +
            (data.duplicates.held_out
              ? `, ${whole(data.duplicates.held_out)} of them copies of held-out samples`
              : ""),
        ],
      ]
    : []),
  [whole(data.selected), `selected, ${percent(data.unique / data.pool.samples)} of the pool`],
  [
    percent(low.covered),
    `of the ${whole(low.n_clusters)} lowest clusters covered (at random ${percent(low.random_covered)})`,
  ],
  ...(data.classes
    ? [
        [
          data.classes.entropy[2].toFixed(2),
          `nats of class entropy (pool ${data.classes.entropy[0].toFixed(2)}, at random ${data.classes.entropy[1].toFixed(2)}, ` +
            `at most ${Math.log(data.classes.before.filter(n => n).length).toFixed(2)})`,
        ],
      ]
    : []),
];
find("#summary").append(
  ...summary.map(([value, name]) => make("div", {}, make("b", {}, value), make("span", {}, name))),
);
for (const element of document.querySelectorAll(".legend[data-series]"))
  legend(element, element.dataset.series.split(" "));

// ---- Curves ----
const redraws = [];
function chart(parent, series, options) {
  const holder = make("div"),
    read = make("div", { className: "read" });
  parent.append(make("div", {}, ...(options.title ? [make("b", {}, options.title)] : []), holder, read));
  const logs = options.log ?? true;
  const scale = v => (logs ? Math.log10(v) : v);
  const xs = series.flatMap(s => s.x.map(scale)),
    ys = series.flatMap(s => s.y.map(scale));
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  if (!logs) y0 = Math.min(0, y0);
  if (x1 - x0 < 1e-9) x1 = x0 + 1;
  if (y1 - y0 < 1e-9) y1 = y0 + 1;
  y1 += 0.04 * (y1 - y0);
  const ticks = (from, to) => {
    if (logs) {
      const steps = to - from > 1.7 ? [1] : [1, 2, 5],
        out = [];
      for (let e = Math.floor(from); e <= to; e++) for (const s of steps) out.push(s * 10 ** e);
      return out.filter(v => scale(v) >= from - 1e-9 && scale(v) <= to + 1e-9);
    }
    const rough = (to - from) / 4,
      power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].find(s => s * power >= rough) * power,
      out = [];
    for (let v = Math.ceil(from / step) * step; v <= to + 1e-9; v += step) out.push(Number(v.toPrecision(6)));
    return out;
  };
  redraws.push(() => {
    const width = Math.max(holder.clientWidth, 200),
      height = 214,
      left = 46,
      bottom = 34,
      top = 20;
    const px = v => left + ((scale(v) - x0) / (x1 - x0)) * (width - left - 26);
    const py = v => height - bottom - ((scale(v) - y0) / (y1 - y0)) * (height - bottom - top);
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute(
      "aria-label",
      `${options.title ? `${options.title}. ` : ""}${options.yName} by ${options.xName}: ` +
        series
          .map(
            s =>
              `${s.name} from ${(options.yText || short)(s.y[0])} to ${(options.yText || short)(s.y.at(-1))}`,
          )
          .join(", "),
    );
    const draw = (name, attributes, text) => {
      const node = document.createElementNS(svg.namespaceURI, name);
      for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
      if (text !== undefined) node.textContent = text;
      svg.append(node);
    };
    for (const v of ticks(y0, y1)) {
      draw("line", { x1: left, x2: width - 26, y1: py(v), y2: py(v), stroke: "var(--line)" });
      draw("text", { x: left - 6, y: py(v) + 4, "text-anchor": "end" }, (options.yText || short)(v));
    }
    for (const v of ticks(x0, x1))
      draw(
        "text",
        { x: px(v), y: height - bottom + 15, "text-anchor": "middle" },
        (options.xText || short)(v),
      );
    draw("text", { x: left, y: height - 4 }, options.xName);
    draw("text", { x: 0, y: 11 }, options.yName);
    for (const s of series)
      draw("polyline", {
        points: s.x.map((v, i) => `${px(v)},${py(s.y[i])}`).join(" "),
        fill: "none",
        stroke: COLOURS[s.name],
        "stroke-width": 2,
        "stroke-linejoin": "round",
      });
    svg.addEventListener("pointermove", event => {
      const at = (((event.offsetX * width) / svg.clientWidth - left) / (width - left - 26)) * (x1 - x0) + x0;
      read.textContent = options.read(logs ? 10 ** at : at, (s, v) => {
        const i = s.x.findIndex(x => x >= v);
        return i < 0 ? null : s.y[i];
      });
    });
    holder.replaceChildren(svg);
  });
}
find("#clusters .panels").style.gridTemplateColumns =
  `repeat(auto-fit, minmax(min(${data.levels.length === 3 ? 300 : 400}px, 100%), 1fr))`;
for (const level of data.levels) {
  const series = Object.entries(level.curves)
    .map(([name, [x, y]]) => ({ name, x, y }))
    .filter(s => s.x.length);
  if (!series.length) continue;
  chart(find("#clusters .panels"), series, {
    title: `Level ${level.level}: ${plural(level.n_clusters, "cluster")}`,
    xName: "clusters, the largest first",
    yName: "samples in a cluster",
    read: (x, at) =>
      `at rank ${whole(Math.max(1, Math.round(x)))}: ` +
      series.map(s => `${s.name} ${at(s, Math.round(x)) ?? 0}`).join(", "),
  });
}
find("#levels").append(
  table(
    ["level", "of", "perplexity", "Gini", "covered", "clusters", "size: median (range)"],
    data.levels.flatMap(l => [
      [
        l.level,
        "pool",
        short(l.perplexity),
        l.gini.toFixed(2),
        "",
        whole(l.n_clusters) + (l.n_empty ? `, ${whole(l.n_empty)} empty` : ""),
        `${short(l.size_median)} (${whole(l.size_min)}–${whole(l.size_max)})`,
      ],
      ["", "random", short(l.random_perplexity), l.random_gini.toFixed(2), percent(l.random_covered), "", ""],
      ["", "selected", short(l.selected_perplexity), l.selected_gini.toFixed(2), percent(l.covered), "", ""],
    ]),
  ),
);

// ---- Classes ----
if (data.classes) {
  const c = data.classes,
    order = c.before
      .map((_n, i) => i)
      .filter(i => c.before[i])
      .sort((a, b) => c.before[b] - c.before[a]);
  const kinds = [
      ["pool", c.before],
      ["random", c.random],
      ["selected", c.after],
    ],
    sum = values => values.reduce((a, b) => a + b, 0);
  find("#classes p").textContent =
    `Entropy is at most ${Math.log(order.length).toFixed(2)} nats, for ${plural(order.length, "class", "es")} of one size. ` +
    (c.unlabelled ? `${plural(c.unlabelled, "sample")} without a label left out. ` : "") +
    "Labels took no part in the selection.";
  find("#classes .figures").append(
    table(
      ["", "samples", "classes", "entropy, nats", "largest / smallest class"],
      kinds.map(([name, values], k) => [
        name,
        whole(sum(values)),
        whole(values.filter(n => n).length),
        c.entropy[k].toFixed(2),
        c.ratio[k] === null ? "a class is missing" : short(c.ratio[k]),
      ]),
    ),
  );
  const share = (values, i) => values[i] / Math.max(sum(values), 1),
    most = Math.max(...kinds.flatMap(([, values]) => order.map(i => share(values, i))));
  const body = find("#classes .body");
  if (order.length <= 40)
    body.append(
      make("h3", {}, "Share of each class, and its samples"),
      ...order.map(i =>
        make(
          "div",
          { className: "bar" },
          make("span", { title: c.names[i] }, c.names[i]),
          make(
            "div",
            {},
            ...kinds.map(([name, values]) =>
              make(
                "div",
                {
                  style: `width:${(100 * share(values, i)) / most}%;background:${COLOURS[name]}`,
                  title: `${name}: ${whole(values[i])}`,
                },
                make("em", {}, `${percent(share(values, i))} · ${whole(values[i])}`),
              ),
            ),
          ),
        ),
      ),
    );
  else {
    const series = kinds
      .map(([name, values]) => {
        const y = values
          .filter(n => n)
          .sort((a, b) => b - a)
          .map(n => n / sum(values));
        return { name, y, x: y.map((_, i) => i + 1) };
      })
      .filter(s => s.x.length);
    chart(body, series, {
      xName: "classes, the largest first",
      yName: "share of the samples",
      yText: percent,
      read: (x, at) =>
        `class of rank ${whole(Math.max(1, Math.round(x)))}: ` +
        series.map(s => `${s.name} ${percent(at(s, Math.round(x)) ?? 0)}`).join(", "),
    });
    body.append(
      make(
        "details",
        {},
        make("summary", {}, `all ${whole(order.length)} classes`),
        make(
          "div",
          { className: "scroll" },
          table(
            ["class", "pool", "random", "selected"],
            order.map(i => [c.names[i], ...kinds.map(([, values]) => whole(values[i]))]),
          ),
        ),
      ),
    );
  }
} else find("#classes").remove();

// ---- Coverage ----
// What a selection gives up in the crowded middle, and what it gains at the edge.
function trade(c) {
  const better = q => c.selected[Math.round(100 * q)] < c.random[Math.round(100 * q)];
  if (!better(0.5) && better(0.99))
    return "So the middle is farther, and the edge nearer: crowded regions give samples up, and rare ones gain them. That is the trade that balancing makes.";
  if (!better(0.5))
    return "The middle is farther than by chance, as a balanced selection takes less of crowded regions, where a random one takes most; here the edge has not gained by it. Where coverage counts more than balance, select more samples.";
  if (!better(0.99))
    return "The middle is nearer than by chance, and the edge no nearer: few of the selected samples lie far out.";
  return "Both the middle and the edge are nearer than by chance.";
}
if (data.coverage) {
  const c = data.coverage,
    at = (curve, q) => short(curve[Math.round(100 * q)]);
  find("#coverage p").textContent =
    `How far a sample of the pool is from the nearest selected one (${
      c.metric === "cosine" ? "1 − cosine" : "Euclidean distance"
    } of embeddings, ${plural(c.queries, "sample")} measured). Half are within ` +
    `${at(c.selected, 0.5)} (random selection ${at(c.random, 0.5)}), 95 % within ${at(c.selected, 0.95)} (${at(c.random, 0.95)}), ` +
    `99 % within ${at(c.selected, 0.99)} (${at(c.random, 0.99)}). ` +
    trade(c);
  const series = ["random", "selected"].map(name => ({ name, x: c.share, y: c[name] }));
  chart(find("#coverage .body"), series, {
    log: false,
    xText: percent,
    yName: "distance to the nearest selected sample",
    xName: "share of the pool's samples that are at most this far",
    read: (x, look) =>
      `${percent(Math.min(Math.max(x, 0), 1))} of the pool is within ` +
      series.map(s => `${short(look(s, x) ?? s.y.at(-1))} (${s.name})`).join(", "),
  });
} else find("#coverage").remove();
