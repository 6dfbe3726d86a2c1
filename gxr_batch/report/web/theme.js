// The page's own scripts, one after the other in one element: theme, elements, table, case, start. They ask nothing
// of any network. This one: light or dark, as chosen here before, else as the system says; at once, so that nothing flashes.
"use strict";

const byId = (id) => document.getElementById(id);

const system = matchMedia("(prefers-color-scheme: dark)");
const remembered = {
  get() { try { return localStorage.getItem("gxr-theme"); } catch { return null; } }, // some browsers refuse for files
  set(theme) { try { localStorage.setItem("gxr-theme", theme); } catch { /* then it holds for this visit */ } },
};
function paint(theme) {
  document.documentElement.dataset.theme = theme;
  if (byId("theme")) byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
}
paint(remembered.get() ?? (system.matches ? "dark" : "light"));
system.addEventListener("change", (event) => { if (!remembered.get()) paint(event.matches ? "dark" : "light"); });
