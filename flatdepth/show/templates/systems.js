for (const group of document.querySelectorAll(".case")) {
  const slider = group.querySelector(".slider");
  const range = slider.querySelector("input");
  const cloud = group.querySelector(".cloud select");
  const thumbs = [...group.querySelectorAll("button[data-key]")];
  const of = (side) => (tag) => group.querySelector(`${tag}[data-side="${side}"]`);
  const sides = { left: of("left"), right: of("right") };

  const move = () => {
    slider.style.setProperty("--at", `${range.value}%`);
    range.setAttribute("aria-valuetext", `${Math.round(range.value)} % of the left picture`);
  };
  const show = (side, key) => {
    const thumb = thumbs.find((one) => one.dataset.key === key);
    const { src, alt } = thumb.querySelector("img");
    Object.assign(sides[side]("img"), { src, alt });
    sides[side](".chip").textContent = thumb.dataset.name;
    sides[side]("select").value = key;
    const shown = [sides.left("select").value, sides.right("select").value];
    for (const one of thumbs) one.setAttribute("aria-pressed", shown.includes(one.dataset.key));
  };

  range.addEventListener("input", move);
  for (const [side, find] of Object.entries(sides)) {
    find("select").addEventListener("change", (event) => show(side, event.target.value));
  }
  for (const thumb of thumbs) {
    thumb.addEventListener("click", () => {
      const { key } = thumb.dataset;
      show("right", key);
      if (key === "image") return;
      cloud.value = key.split(" ").at(-1);
      cloud.dispatchEvent(new Event("change"));
    });
  }
  group.querySelector(".check input")?.addEventListener("change", (event) => {
    slider.classList.toggle("plain", !event.target.checked);
  });
  group.querySelector(".stage").hidden = false;
  show("left", "image");
  show("right", "depth 0");
  move();
}
