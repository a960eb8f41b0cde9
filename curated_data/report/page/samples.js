// ---- Images ----
const m = data.map,
  ids = unpack(m.id, m.wide_ids ? Float64Array : Int32Array),
  labelOf = m.label && unpack(m.label, Int32Array);
if (data.tiles.image)
  document.head.append(make("style", {}, `.shot:not(.name) { background-image: url(${data.tiles.image}); }`));
const placeOf = new Map(Array.from(ids, (id, i) => [id, i]));
function shot(id, tile) {
  if (tile < 0)
    return make(
      "button",
      { className: "shot name", onclick: () => show(id, true), type: "button" },
      `#${id}`,
    );
  const image = make("button", {
    className: "shot",
    type: "button",
    onclick: event => viewLarge(id, event.currentTarget),
  });
  image.dataset.id = id;
  image.title = described(id);
  image.setAttribute("aria-label", image.title);
  place(image, tile, 1);
  return image;
}
function place(element, tile, scale) {
  const { size, columns } = data.tiles;
  element.style.backgroundPosition = `${-scale * size * (tile % columns)}px ${-scale * size * Math.floor(tile / columns)}px`;
  if (scale !== 1) element.style.backgroundSize = `${scale * size * columns}px auto`;
}
function described(id) {
  const i = placeOf.get(id);
  const label = labelOf && labelOf[i] >= 0 ? `, class ${data.classes.names[labelOf[i]]}` : "";
  return `sample ${id}${label}${m.captions?.[i] ? `: ${m.captions[i]}` : ""}`;
}
const tiles = ([which, places]) =>
  make(
    "div",
    { className: "shots" },
    ...(which.length ? which.map((id, i) => shot(id, places[i])) : [make("small", {}, "none")]),
  );
function sides(kept, dropped) {
  const side = (name, samples) => make("div", {}, make("small", {}, name), tiles(samples));
  return make("div", { className: "sides" }, side("kept", kept), side("dropped", dropped));
}
const why = { largest: "The largest", smallest: "The smallest", "most cut": "The most cut" };
let previous = "";
for (const sheet of data.sheets) {
  if (sheet.why !== previous) find("#sheets .body").append(make("h3", {}, why[sheet.why]));
  previous = sheet.why;
  find("#sheets .body").append(
    make(
      "div",
      { className: "row" },
      make(
        "div",
        {},
        `C${clusterText(1, sheet.cluster).slice(1)}: ${whole(sheet.n_kept)} of ${plural(sheet.size, "sample")} kept`,
      ),
      sides(sheet.kept, sheet.dropped),
    ),
  );
}
if (data.singles)
  find("#sheets .body").append(
    make("h3", {}, "Alone in their cluster"),
    make(
      "div",
      { className: "row" },
      make(
        "div",
        {},
        `${plural(data.singles.n, "cluster")} of a single sample, ${whole(data.singles.n_kept)} kept`,
      ),
      sides(data.singles.kept, data.singles.dropped),
    ),
  );

// ---- Near-duplicates, failures, settings ----
if (data.duplicates) {
  const d = data.duplicates;
  const left = d.removed
    ? [
        `${whole(d.removed)} ${d.removed === 1 ? "copy" : "copies"} in ${plural(d.n_groups, "group")} left the pool before it was clustered. Each is near the one of its group that stayed; the examples are the least alike.`,
      ]
    : [];
  if (d.held_out)
    left.push(
      `${plural(d.held_out, "sample")} left because ${d.held_out === 1 ? "it is a copy" : "they are copies"} of held-out ones.`,
    );
  find("#duplicates p").textContent = left.join(" ") || "None found.";
  const body = find("#duplicates .body");
  if (d.groups.length)
    body.append(
      make("h3", {}, "The largest groups"),
      ...d.groups.map(g =>
        make(
          "div",
          { className: "row" },
          make("div", {}, `${whole(g.size)} samples alike`),
          sides(g.kept, g.dropped),
        ),
      ),
    );
  if (d.held_out)
    body.append(
      make("h3", {}, "Copies of held-out samples"),
      make("div", { className: "row" }, tiles(d.held_out_examples)),
    );
} else find("#duplicates").remove();
const dropped = data.filters;
if (dropped) {
  find("#filters p").textContent =
    `${plural(dropped.dropped, "sample")} took no part: ${whole(dropped.excluded)} by name, ${whole(dropped.nulls)} for a value that is missing.`;
  const conditions = dropped.conditions.map(c => [c.text, whole(c.drops), whole(c.nulls)]);
  if (conditions.length)
    find("#filters .body").append(table(["condition", "drops alone", "of these NULL"], conditions, "text"));
  if (dropped.examples.length)
    find("#filters .body").append(
      make("h3", {}, "Some of those that were dropped"),
      table(["id", "key"], dropped.examples, "text tight"),
    );
} else find("#filters").remove();
if (data.retrieval) {
  const sets = Object.entries(data.retrieval).map(([name, s]) => [
    name,
    ...[s.seeds, s.retrieved, s.selected].map(n => (n === undefined ? "by quotas" : whole(n))),
  ]);
  find("#retrieval .body").append(
    table(["seed set", "seeds", "retrieved", "of these selected"], sets, "text"),
  );
} else find("#retrieval").remove();
const f = data.failures;
find("#failures p").textContent = f.count
  ? `${plural(f.count, "sample")} could not be decoded or embedded; they took no part.`
  : "None.";
if (f.count)
  find("#failures .body").append(
    table(
      ["reason", "samples"],
      f.reasons.map(([reason, n]) => [reason, whole(n)]),
      "text",
    ),
    make(
      "details",
      {},
      make("summary", {}, f.examples.length < f.count ? `the first ${f.examples.length}` : "all of them"),
      table(["id", "shard", "key", "reason"], f.examples, "text tight"),
    ),
  );
const settings = find("#settings .body"),
  usual = data.settings.filter(row => row[2]);
settings.append(
  table(
    ["setting", "value"],
    [...data.origin, ...data.settings.filter(row => !row[2]).map(([name, value]) => [name, value])],
    "text named",
  ),
);
if (data.tree.length)
  settings.append(
    make("h3", {}, "Levels of the tree, bottom up"),
    table(["level", "clusters", "resamplings", "samples per cluster in each", "splits"], data.tree),
  );
if (usual.length)
  settings.append(
    make(
      "details",
      {},
      make("summary", {}, `${whole(usual.length)} settings at their defaults`),
      make(
        "div",
        { className: "columns" },
        table(
          ["setting", "value"],
          usual.map(([name, value]) => [name, value]),
          "text named",
        ),
      ),
    ),
  );
const seconds = Object.entries(data.seconds);
if (seconds.length)
  settings.append(
    make("h3", {}, "Seconds in the run that wrote this page (next to none where the cache had it)"),
    table(
      seconds.map(([name]) => name.replace("_", "-")),
      [seconds.map(([, s]) => short(s))],
    ),
  );
