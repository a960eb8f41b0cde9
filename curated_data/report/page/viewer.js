// ---- The viewer of larger images ----
const viewer = find("#viewer"),
  viewed = { group: [], at: 0 };
function viewLarge(id, button) {
  viewed.group = [...(button.parentElement?.querySelectorAll("[data-id]") ?? [button])].map(one =>
    Number(one.dataset.id),
  );
  viewed.at = viewed.group.indexOf(id);
  drawLarge();
  if (!viewer.open) viewer.showModal();
}
function drawLarge() {
  const id = viewed.group[viewed.at],
    i = placeOf.get(id),
    large = data.large[id];
  let image;
  if (large) image = make("img", { src: large, alt: described(id) });
  else {
    image = make("div", { className: "shot large", role: "img" });
    image.setAttribute("aria-label", described(id));
    place(image, tileOf[i], 4);
  }
  root.dataset.viewed = id;
  find("#picture").replaceChildren(image);
  find("#told").replaceChildren(
    make("div", {}, `${described(id)}`),
    make(
      "div",
      { className: "soft" },
      `key ${m.keys[i]}; ${REASONS[reasonOf(i)]}; ${viewed.at + 1} of ${viewed.group.length}`,
    ),
  );
}
function stepLarge(by) {
  viewed.at = (viewed.at + by + viewed.group.length) % viewed.group.length;
  drawLarge();
}
find("#before").onclick = () => stepLarge(-1);
find("#after").onclick = () => stepLarge(1);
find("#close").onclick = () => viewer.close();
find("#reasons").onclick = () => {
  viewer.close();
  show(viewed.group[viewed.at], true);
};
viewer.addEventListener("keydown", event => {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (by) {
    event.preventDefault();
    stepLarge(by);
  }
});
