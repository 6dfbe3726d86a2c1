// The cases and their table: search, sort, filter, paging.

// Returns the cases that cases.py packed: JSON, compressed with gzip, encoded in base64.
async function unpacked() {
  const block = byId("packed-cases");
  const letters = atob(block.textContent);
  block.remove(); // frees its memory
  const bytes = new Uint8Array(letters.length);
  for (let at = 0; at < letters.length; at++) bytes[at] = letters.charCodeAt(at);
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

// Seeds, hashes and timings are not searched, because most numbers would be found in them.
const searched = (column) => column.values && (column.own || (!["number", "moment"].includes(column.kind) && column.name !== "gxr_prompt_sha256"));

const cases = {
  head: null, legend: {}, own: new Map(), other: new Map(), haystack: [],
  take(head) {
    this.head = head;
    this.legend = head.legend;
    for (const column of head.columns) (column.other ? this.other : this.own).set(column.name, column);
    this.haystack = new Array(head.rows).fill("");
  },
  value(column, row) { return column.values ? column.values[row] : column.constant; },
  of(name, row) { const column = this.own.get(name); return column ? this.value(column, row) ?? null : null; },
  ofOther(name, row) { const column = this.other.get(name); return column ? this.value(column, row) ?? null : null; },
  flags(row) { return this.of("gxr_flags", row) ?? []; },
  name(row) {
    const sample = this.of("gxr_sample", row);
    return sample > 1 ? `${this.of("gxr_row_id", row)} #${sample}` : this.of("gxr_row_id", row);
  },
  otherText(row) { return this.ofOther("comparison", row) === "same text" ? this.of("gxr_text", row) : this.ofOther("gxr_text", row); },
  matches(row, words) {
    if (words.length === 0) return true;
    if (this.haystack[row] === "") { // made on the first search, so that the page opens faster
      const cells = this.head.columns.filter(searched).map((column) => shown(this.value(column, row), column.kind));
      this.haystack[row] = cells.join("\n").toLowerCase() + "\n";
    }
    return words.every((word) => this.haystack[row].includes(word));
  },
};

const SORTS = {
  place: (row) => row,
  id: (row) => cases.name(row),
  status: (row) => ["failed", "held", "ok"].indexOf(cases.of("gxr_status", row)),
  flags: (row) => cases.flags(row).length,
  tokens: (row) => cases.of("gxr_new_tokens", row),
  seconds: (row) => cases.of("gxr_seconds_generating", row),
};
const FILTERS = {
  status: (row) => [cases.of("gxr_status", row)],
  flag: (row) => (cases.flags(row).length ? ["any flag", ...cases.flags(row)] : ["no flag"]),
  review: (row) => [cases.of("gxr_review_status", row)],
  finish: (row) => [cases.of("gxr_finish_reason", row)],
  compared: (row) => [cases.ofOther("comparison", row)],
};
const view = { order: [], page: 0, size: 50, sort: "place", down: false, words: [] };
const collator = new Intl.Collator("en", { numeric: true });

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null); // missing values come last in either order
  const by = typeof a === "string" ? collator.compare(a, b) : a - b;
  return view.down ? -by : by;
}

function choose() {
  const wanted = Object.entries(FILTERS).map(([name, of]) => [byId(`filter-${name}`)?.value ?? "", of]).filter(([value]) => value);
  view.words = [...byId("search").value.toLowerCase().matchAll(/"([^"]+)"|[^\s"]+/gu)].map((found) => found[1] ?? found[0]);
  view.order = [];
  for (let row = 0; row < cases.head.rows; row++) {
    if (wanted.every(([value, of]) => of(row).includes(value)) && cases.matches(row, view.words)) view.order.push(row);
  }
  const key = SORTS[view.sort];
  const keys = new Map(view.order.map((row) => [row, key(row)]));
  view.order.sort((a, b) => compare(keys.get(a), keys.get(b)) || a - b);
  view.page = 0;
  draw();
}

// Keeps line breaks, so that headings stay visible, and removes empty lines to save space.
const dense = (text) => text.trim().replace(/\n\s*\n/gu, "\n");

function clamped(text, note) {
  const cell = element("div", { class: text === null ? "none" : "clamp" });
  return element("td", {}, write(cell, text === null ? note : dense(text), text === null ? [] : view.words));
}

function line(row) {
  const status = cases.of("gxr_status", row);
  const withheld = status === "held" && !cases.head.include_held;
  const verdict = cases.ofOther("comparison", row);
  const open = element("button", { type: "button", class: "open", tabindex: "-1" });
  const tokens = cases.of("gxr_new_tokens", row);
  const seconds = cases.of("gxr_seconds_generating", row);
  const made = element("tr", { "data-row": row },
    element("th", { scope: "row" }, write(open, cases.name(row), view.words),
      element("span", { class: "place" }, `row ${whole.format(cases.head.places[row] + 1)}`)),
    element("td", {}, state(status), state(cases.of("gxr_review_status", row)), verdict ? state(verdict, "compared") : null),
    clamped(cases.of(cases.head.findings, row), withheld ? "withheld" : "empty"),
    textCell(cases.of("gxr_text", row), cases.of("gxr_error", row) ?? (withheld ? "withheld" : "no text")),
    element("td", {}, ...cases.flags(row).map(chip)),
    element("td", { class: "figure" }, tokens === null ? "" : whole.format(tokens)),
    element("td", { class: "figure" }, seconds === null ? "" : seconds.toFixed(seconds < 10 ? 2 : 1)));
  return made;
}

function draw() {
  const { order, size } = view;
  const pages = Math.max(1, Math.ceil(order.length / size));
  view.page = Math.min(view.page, pages - 1);
  const first = view.page * size;
  const rows = order.slice(first, first + size);
  byId("rows").replaceChildren(...rows.map(line));
  const start = byId("rows").querySelector(".open");
  if (start) start.tabIndex = 0;
  const range = rows.length ? `, showing ${whole.format(first + 1)} to ${whole.format(first + rows.length)}` : "";
  byId("count").textContent = `${whole.format(order.length)} of ${whole.format(cases.head.rows)} cases${range}`;
  byId("page-at").textContent = `page ${whole.format(view.page + 1)} of ${whole.format(pages)}`;
  byId("page-back").disabled = view.page === 0;
  byId("page-on").disabled = view.page >= pages - 1;
  if (!rows.length) {
    const empty = element("td", { colspan: "7", class: "none" }, "No case matches. Clear the search and filters to see all cases.");
    byId("rows").append(element("tr", {}, empty));
  }
  for (const head of document.querySelectorAll("#table th[data-sort]")) {
    if (head.dataset.sort === view.sort) head.setAttribute("aria-sort", view.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  }
}

function turn(pages) {
  view.page += pages;
  draw();
  focusOn(byId("rows").querySelector(".open"));
}

function focusOn(button) {
  if (!button) return;
  for (const other of document.querySelectorAll("#rows .open[tabindex='0']")) other.tabIndex = -1;
  button.tabIndex = 0;
  button.focus();
  button.closest("tr").scrollIntoView({ block: "nearest" });
}

function move(step) {
  const buttons = [...document.querySelectorAll("#rows .open")];
  const at = buttons.indexOf(document.activeElement);
  if (at < 0) focusOn(buttons.find((button) => button.tabIndex === 0));
  else if (buttons[at + step]) focusOn(buttons[at + step]);
  else if (step > 0 && !byId("page-on").disabled) turn(1);
  else if (step < 0 && !byId("page-back").disabled) { turn(-1); focusOn([...document.querySelectorAll("#rows .open")].at(-1)); }
}
