// Texts with a form, by section. `cases.head.form` has each section's heading, what it begins with, its kind, and whether
// it is hidden; it is empty in a run without a form.

// Returns the sections with their headings, null unless the text has the form exactly; as forms/layout.py reads it.
function piecesOf(text) {
  const form = cases.head.form;
  const pieces = (text ?? "").trim().split("\n\n");
  return form.length && pieces.length === form.length && form.every((part, at) => pieces[at].startsWith(part.opening)) ? pieces : null;
}

const contentsOf = (text) => piecesOf(text)?.map((piece, at) => piece.slice(cases.head.form[at].heading.length + 1).trim()) ?? null;

function prose(text, pieces = null) {
  const made = element("div", { class: text === null ? "prose none" : "prose" });
  if (text === null || !pieces) return write(made, text ?? "no text", text === null ? [] : view.words);
  made.setAttribute("dir", "auto");
  made.append(...pieces);
  return made;
}

function section(part, content, pieces) {
  const items = content.split("\n").map((line) => line.replace(/^-\s*/u, ""));
  const listed = () => element("ul", { class: "prose" }, ...items.map((item) => write(element("li"), item, view.words)));
  const body = part.kind === "bullets" && !pieces ? listed() : prose(content, pieces);
  if (!part.hidden) return element("div", { class: "section" }, write(element("h4"), part.heading), body);
  const summary = element("summary", {}, element("span", { class: "shut" }, "Show "), part.heading);
  const made = element("details", { class: "section" }, summary, body);
  made.open = view.words.some((word) => content.toLowerCase().includes(word)); // else the word would not be seen
  return made;
}

// A text as elements, section by section if it has the form; `marks` returns the marked pieces of a section.
function laidOut(text, marks = null) {
  const contents = contentsOf(text);
  if (!contents) return [prose(text, marks?.(0))];
  return contents.map((content, at) => section(cases.head.form[at], content, marks?.(at)));
}

// Returns what marks the words that only the one and only the other text has, null if they have little in common.
function changes(before, after) {
  if (before === null || after === null || before === after) return null;
  const [left, right] = [contentsOf(before), contentsOf(after)];
  if (!left !== !right) return null;
  const differences = left ? left.map((one, at) => (one === right[at] ? null : difference(one, right[at]))) : [difference(before, after)];
  return differences.some(Boolean) ? [0, 1].map((which) => (at) => differences[at]?.[which] ?? null) : null;
}

// In the table, a hidden section is only named; on paper, where nothing can be opened, it is shown.
function folded(text) {
  const cell = element("div", { class: "clamp", dir: "auto" });
  piecesOf(text).forEach((piece, at) => {
    const { heading, hidden } = cases.head.form[at];
    if (hidden) cell.append(element("span", { class: "unprinted" }, `${heading}: hidden\n`));
    cell.append(write(element("span", { class: hidden ? "printed" : "" }), `${dense(piece)}\n`, view.words));
  });
  return cell;
}

function textCell(text, note) {
  const foldable = cases.head.form.some((part) => part.hidden) && piecesOf(text);
  return foldable ? element("td", {}, folded(text)) : clamped(text, note);
}
