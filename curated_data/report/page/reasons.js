// ---- Why was this chosen ----
const leaf = unpack(m.leaf, Int32Array),
  count = unpack(m.count, Uint16Array),
  tileOf = unpack(m.tile, Int32Array);
const shardOf = unpack(m.shard, Int32Array);
const rankOf = m.rank && unpack(m.rank, Int32Array),
  distanceOf = m.distance && unpack(m.distance, Float32Array);
const clusters = data.clusters.map(t =>
  Object.fromEntries(Object.entries(t).map(([k, v]) => [k, unpack(v, Int32Array)])),
);
const setting = Object.fromEntries(data.settings.map(([name, value]) => [name, value]));
const ALONE = {
  sparse: "by how alone they lie among their neighbours",
  greedy: "one after the other by how much nearer they bring the selection to all samples",
}[setting.sampling]; // how samples are drawn that clusters have no share of
const EQUAL = !ALONE && !data.settings.some(([name, , usual]) => name.startsWith("quotas.") && !usual);
if (setting.sampling === "sparse") {
  find("#flatness").textContent =
    "This selection draws more of the samples that lie alone, not evenly over clusters, " +
    "so it need not be flatter: compact clusters give less, scattered ones more.";
}
if (setting.sampling === "greedy") {
  find("#flatness").textContent =
    "This selection takes samples that every other has one of near it, not evenly over clusters, " +
    "so it need not be flatter.";
}
const REASONS = {
  selected: "selected",
  drawn: "not drawn",
  near: "a near-duplicate",
  held: "a copy of a held-out sample",
  out: "failed, or excluded",
};
function reasonOf(i) {
  if (count[i]) return "selected";
  if (leaf[i] >= 0) return "drawn";
  return copyOf?.[i] >= 0 ? "near" : copyOf?.[i] === -2 ? "held" : "out";
}
const copyOf = m.copy && unpack(m.copy, m.wide_ids ? Float64Array : Int32Array),
  cosineOf = m.cosine && unpack(m.cosine, Float32Array);
const link = id => {
  const a = make("a", { href: `#sample=${id}` }, String(id));
  a.onclick = event => {
    event.preventDefault();
    show(id, true);
  };
  return a;
};
let current = -1;
function show(id, scroll) {
  const i = placeOf.get(id),
    box = find("#why");
  if (i === undefined) {
    box.replaceChildren(
      make(
        "p",
        {},
        `Sample ${id} is not among the ${whole(m.n)} samples that this page knows of.` +
          (id < data.pool.samples
            ? ` For the others: curated-data inspect CACHE --sample ${id}`
            : ` The pool has ids 0 to ${whole(data.pool.samples - 1)}.`),
      ),
    );
    return;
  }
  current = i;
  root.dataset.sample = id;
  const times = count[i],
    parts = [];
  if (tileOf[i] >= 0) parts.push(shot(id, tileOf[i]));
  parts.push(
    make(
      "div",
      {},
      "Sample ",
      link(id),
      ", key ",
      make("b", {}, m.keys[i]),
      m.shards.length ? ` in ${m.shards[shardOf[i]]}` : "",
    ),
  );
  if (labelOf && labelOf[i] >= 0)
    parts.push(make("div", { className: "soft" }, `class ${data.classes.names[labelOf[i]]}`));
  if (m.captions?.[i]) parts.push(make("blockquote", {}, m.captions[i]));
  if (leaf[i] < 0) {
    const failed = f.examples.find(row => row[0] === id);
    const copy = copyOf ? copyOf[i] : -1;
    parts.push(
      make("p", { className: "verdict" }, "Left out before the clustering"),
      make(
        "p",
        {},
        failed
          ? `It failed: ${failed[3]}.`
          : copy === -2
            ? `It is a copy of a held-out sample (cosine ${cosineOf[i].toFixed(4)}).`
            : copy >= 0
              ? "It is a near-duplicate of sample "
              : "It could not be decoded or embedded.",
        ...(copy >= 0 ? [link(copy), `, which stayed (cosine ${cosineOf[i].toFixed(4)}).`] : []),
      ),
    );
  } else {
    parts.push(
      make(
        "p",
        { className: "verdict" },
        times === 0 ? "Not selected" : times === 1 ? "Selected" : `Selected ${times} times`,
      ),
    );
    const rows = [];
    let at = leaf[i];
    clusters.forEach((t, l) => {
      const share = l + 1 < clusters.length ? clusters[l + 1].given[t.parent[at]] : data.selected;
      rows.unshift([
        `${l + 1}: ${clusterText(l + 1, t.id[at])}`,
        whole(t.size[at]),
        ...(EQUAL ? [short(share / t.siblings[at])] : []),
        whole(t.given[at]),
      ]);
      at = t.parent[at];
    });
    parts.push(
      make(
        "div",
        { className: "scroll" },
        table(
          [
            "level",
            "holds",
            ...(EQUAL ? [setting.sampling === "flat" ? "equal share of its parent" : "equal share"] : []),
            "gave",
          ],
          rows,
        ),
      ),
    );
    const t = clusters[0],
      size = t.size[leaf[i]],
      given = t.given[leaf[i]],
      strategy = setting.strategy || "random";
    let how = `Its lowest cluster gave ${whole(given)} of its ${plural(size, "sample")}`;
    if (given >= size)
      how += given > size ? ": each at least once, some or all of them again." : ": all of them.";
    else if (ALONE)
      how += `, ${percent(given / size)}, where the whole pool gave ${percent(data.unique / data.pool.samples)}. They are drawn ${ALONE}.`;
    else if (strategy === "random")
      how += `, drawn at random: a chance of ${percent(given / size)}, where the whole pool's is ${percent(data.unique / data.pool.samples)}.`;
    else how += `, those ${strategy} ${strategy === "closest" ? "to" : "from"} its centroid.`;
    if (rankOf && !Number.isNaN(distanceOf[i]))
      how += ` It is number ${whole(rankOf[i])} by distance to the centroid (${short(distanceOf[i])}).`;
    parts.push(make("p", {}, how));
    if (EQUAL)
      parts.push(
        make(
          "p",
          { className: "soft" },
          "Each cluster's number is shared evenly by the clusters in it; those too small for an equal share give all they have, and the others more.",
        ),
      );
  }
  box.replaceChildren(...parts);
  if (scroll) {
    history.replaceState(null, "", `#sample=${id}`);
    find("#mapped").scrollIntoView({ behavior: "smooth", block: "start" });
  }
  paint();
}
find("#find").addEventListener("submit", event => {
  event.preventDefault();
  const text = find("#query").value.trim(),
    key = m.keys.indexOf(text);
  if (key >= 0) show(ids[key], true);
  else if (/^\d+$/.test(text)) show(Number(text), true);
  else find("#why").replaceChildren(make("p", {}, `No sample of this page has the key “${text}”.`));
});
