// ---- Search and filter ----
const clusterOf = clusters.map(() => new Int32Array(m.n).fill(-1));
for (let i = 0; i < m.n; i++)
  for (let l = 0, at = leaf[i]; at >= 0 && l < clusters.length; at = clusters[l].parent[at], l++)
    clusterOf[l][i] = clusters[l].id[at];
const PAGE = 60;
let found = [],
  listed = 0;
function offer(select, name, options) {
  if (options.length < 2) select.remove();
  else
    select.append(
      make("option", { value: "" }, name),
      ...options.map(([value, text]) => make("option", { value }, text)),
    );
}
const reasons = new Set(Array.from(leaf, (_, i) => reasonOf(i)));
offer(
  find("#by-reason"),
  "whatever the reason",
  Object.entries(REASONS).filter(([value]) => reasons.has(value)),
);
offer(find("#by-class"), "every class", labelOf ? data.classes.names.map((name, c) => [c, name]) : []);
const largest = clusters
  .flatMap((t, l) =>
    Array.from(t.id, (id, row) => [l, id, t.size[row]])
      .sort((a, b) => b[2] - a[2])
      .slice(0, 200)
      .reverse(),
  )
  .reverse();
offer(
  find("#by-cluster"),
  "every cluster",
  largest.map(([l, id, size]) => [
    `${l}:${id}`,
    `${clusters.length > 1 ? `level ${l + 1}, ` : ""}${clusterText(l + 1, id)}, ${plural(size, "sample")}`,
  ]),
);
function filter() {
  const value = name => find(`#by-${name}`)?.value ?? "",
    words = value("text").toLowerCase().split(/\s+/).filter(Boolean);
  const [level, cluster] = value("cluster") ? value("cluster").split(":").map(Number) : [-1, -1];
  found = [];
  for (let i = 0; i < m.n; i++) {
    if (value("reason") && reasonOf(i) !== value("reason")) continue;
    if (value("class") && labelOf[i] !== Number(value("class"))) continue;
    if (level >= 0 && clusterOf[level][i] !== cluster) continue;
    if (words.length) {
      const text =
        `${m.keys[i]} ${m.captions?.[i] ?? ""} ${labelOf && labelOf[i] >= 0 ? data.classes.names[labelOf[i]] : ""} ${clusterName(1, clusterOf[0][i])}`.toLowerCase();
      if (!words.every(word => text.includes(word))) continue;
    }
    found.push(i);
  }
  found = [...found.filter(i => tileOf[i] >= 0), ...found.filter(i => tileOf[i] < 0)]; // images first
  listed = 0;
  find("#results").replaceChildren();
  moreResults();
}
function moreResults() {
  const next = found.slice(listed, listed + PAGE);
  listed += next.length;
  find("#results").append(...next.map(i => shot(ids[i], tileOf[i])));
  find("#n-found").textContent =
    `${plural(found.length, "sample")}${m.whole ? "" : ` of the ${whole(m.n)} that this page knows of`}${listed < found.length ? `, ${whole(listed)} shown` : ""}`;
  find("#more").hidden = listed >= found.length;
}
find("#more").onclick = moreResults;
find("#chooser").addEventListener("input", filter);
find("#chooser").addEventListener("submit", event => event.preventDefault());
filter();

// ---- The opening ----
const opening = data.opening;
find("#claim").textContent = opening.claim;
if (opening.rows.length > 1) {
  const most = Math.max(...opening.rows.flatMap(row => [row.before, row.after]));
  find("#opening .soft").textContent =
    `Share of each ${opening.kind}${opening.kind === "cluster" ? ` of level ${opening.level}` : ""} in the pool and in the selection` +
    (opening.left_out
      ? `; the largest and the smallest are shown, ${whole(opening.left_out)} between them are not.`
      : ".");
  find("#opening .body").append(
    ...opening.rows.map(row => {
      const dot = (value, colour) =>
        make("i", { style: `left:${(100 * value) / most}%;background:${colour}` });
      const [low, high] = [Math.min(row.before, row.after), Math.max(row.before, row.after)];
      const name = row.name || `cluster ${row.id}`,
        title = make("span", { title: name }, name);
      const i = placeOf.get(row.central);
      if (!row.name && i !== undefined && tileOf[i] >= 0)
        title.replaceChildren(shot(row.central, tileOf[i]), ` ${row.id}`);
      return make(
        "div",
        { className: "change" },
        title,
        make(
          "div",
          {},
          make("b", { style: `left:${(100 * low) / most}%;width:${(100 * (high - low)) / most}%` }),
          dot(row.before, COLOURS.pool),
          dot(row.after, COLOURS.selected),
        ),
        make("em", {}, `${percent(row.before)} → ${percent(row.after)}`),
      );
    }),
  );
} else find("#opening").remove();
find("#warnings").append(
  ...data.catch_all.map(one =>
    make(
      "p",
      { className: "warning" },
      make("b", {}, `C${clusterText(1, one.cluster).slice(1)} is a catch-all: `),
      `${plural(one.size, "sample")}, ${one.width.toFixed(1)} times as spread out as most clusters, ${whole(one.kept)} kept. Look at its images below (Search, by cluster). ` +
        "If they are worth having, ask for more clusters at level 1, so that it is divided; if they are debris, leave them out of the pool.",
    ),
  ),
);
