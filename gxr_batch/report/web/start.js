// Mouse and keyboard input, and initialization.

function keys(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const steps = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 };
  if (byId("case").open) {
    const sideways = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 };
    if (event.key in sideways) { event.preventDefault(); step(sideways[event.key]); }
  } else if (event.target.matches("input, select, textarea")) {
    if (event.target === byId("search") && ["Enter", "ArrowDown"].includes(event.key)) { event.preventDefault(); move(1); }
  } else if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
    byId("search").select();
  } else if (event.key in steps && (event.key.length === 1 || event.target.matches(".open"))) {
    event.preventDefault();
    move(steps[event.key]);
  }
}

function offer(name, of) {
  const select = byId(`filter-${name}`);
  if (!select) return;
  const counts = new Map();
  for (let row = 0; row < cases.head.rows; row++) {
    for (const value of of(row)) if (value !== null) counts.set(value, (counts.get(value) ?? 0) + 1);
  }
  const options = [...counts].sort((a, b) => b[1] - a[1]).map(([value, count]) =>
    element("option", { value }, `${spoken(value)} (${whole.format(count)})`));
  select.replaceChildren(element("option", { value: "" }, "all"), ...options);
  select.addEventListener("change", choose);
}

function listen() {
  let waiting = 0;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(choose, 120); });
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("controls").addEventListener("reset", () => {
    Object.assign(view, { sort: "place", down: false }); // the order of the input table
    setTimeout(choose); // after the fields are cleared
  });
  byId("page-back").addEventListener("click", () => turn(-1));
  byId("page-on").addEventListener("click", () => turn(1));
  byId("page-size").addEventListener("change", (event) => { view.size = Number(event.target.value); view.page = 0; draw(); });
  byId("rows").addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-row]");
    const reading = String(getSelection()) && !event.target.matches(".open"); // the user is selecting text
    if (row && !reading) show(view.order.indexOf(Number(row.dataset.row)));
  });
  for (const head of document.querySelectorAll("#table th[data-sort]")) {
    head.firstElementChild.addEventListener("click", () => {
      view.down = view.sort === head.dataset.sort ? !view.down : ["flags", "tokens", "seconds"].includes(head.dataset.sort);
      view.sort = head.dataset.sort;
      choose();
    });
  }
  byId("case-back").addEventListener("click", () => step(-1));
  byId("case-on").addEventListener("click", () => step(1));
  byId("case-close").addEventListener("click", () => byId("case").close());
  byId("case").addEventListener("close", closed);
  byId("case").addEventListener("click", (event) => { if (event.target === byId("case")) byId("case").close(); });
  document.addEventListener("keydown", keys);
}

document.addEventListener("DOMContentLoaded", async () => {
  paint(document.documentElement.dataset.theme);
  byId("theme").addEventListener("click", () => {
    paint(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    remembered.set(document.documentElement.dataset.theme);
  });
  if (typeof DecompressionStream === "undefined") {
    byId("trouble").textContent = "This browser is too old to show the cases. Use Chrome or Edge 80, Firefox 113, Safari 16.4 or later.";
    byId("trouble").hidden = false;
    return;
  }
  cases.take(await unpacked());
  for (const [name, of] of Object.entries(FILTERS)) offer(name, of);
  listen();
  choose();
  openFromAddress();
  document.documentElement.dataset.ready = "yes";
});
