// The page's scripts are joined into one element: theme, elements, table, sections, case, start. They make no network requests.
// This one sets light or dark, from the saved choice or the system's setting, before the page is drawn.
"use strict";

const byId = (id) => document.getElementById(id);

const system = matchMedia("(prefers-color-scheme: dark)");
const remembered = {
  get() { try { return localStorage.getItem("gxr-theme"); } catch { return null; } }, // some browsers refuse this for files
  set(theme) { try { localStorage.setItem("gxr-theme", theme); } catch { /* the choice lasts for this visit */ } },
};
function paint(theme) {
  document.documentElement.dataset.theme = theme;
  if (byId("theme")) byId("theme").textContent = theme === "dark" ? "Light" : "Dark";
}
paint(remembered.get() ?? (system.matches ? "dark" : "light"));
system.addEventListener("change", (event) => { if (!remembered.get()) paint(event.matches ? "dark" : "light"); });
