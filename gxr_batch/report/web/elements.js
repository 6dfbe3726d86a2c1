// Elements and texts. Texts of cases become text nodes, so that markup in a cell stays text.

function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

const whole = new Intl.NumberFormat("en-GB");
const SPOKEN = {
  ok: "generated", stop: "end token", length: "token limit", closed: "token limit in a section", error: "error", approved_with_edits: "approved with edits",
};
const spoken = (value) => SPOKEN[value] ?? String(value);
const state = (value, kind = value) => element("span", { class: `state ${kind}` }, spoken(value));
// In a narrow column, a flag's name breaks between its words.
const chip = (flag) => element("span", { class: "flag", title: cases.legend[flag] ?? flag },
  ...flag.split(/(?<=_)/u).flatMap((word, at) => (at ? [element("wbr"), word] : [word])));

function shown(value, kind) {
  if (value === null || value === undefined) return "";
  if (kind === "moment") return new Date(value).toISOString().replace("T", " ").replace("Z", " UTC");
  if (kind === "list") return value.join(", ");
  return typeof value === "number" ? String(value) : value;
}

// Writes a text into an element and marks the search words.
function write(target, text, words = []) {
  target.setAttribute("dir", "auto");
  if (words.length === 0) { target.textContent = text; return target; }
  const pattern = new RegExp(words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|"), "giu");
  let at = 0;
  for (const found of text.matchAll(pattern)) {
    target.append(text.slice(at, found.index), element("mark", {}, found[0]));
    at = found.index + found[0].length;
  }
  target.append(text.slice(at));
  return target;
}
