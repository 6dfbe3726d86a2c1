// The case view: one case with all its columns, next to the other run's text in a comparison.

const opened = { at: -1 };

// Marks the words that only one of two texts has. Returns null if the texts have little in common (marking nearly every
// word would not help) or are very long.
function difference(before, after) {
  const [a, b] = [before, after].map((text) => text.match(/\S+\s*|\s+/gu) ?? []);
  if (a.length * b.length > 4e6) return null;
  const word = (piece) => piece.trim();
  const width = b.length + 1;
  const longest = new Uint16Array((a.length + 1) * width); // length of the longest common subsequence from here
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      const at = i * width + j;
      longest[at] = word(a[i]) === word(b[j]) ? longest[at + width + 1] + 1 : Math.max(longest[at + width], longest[at + 1]);
    }
  }
  if (longest[0] < 0.4 * Math.max(a.length, b.length)) return null;
  const [left, right] = [[], []];
  const put = (list, kind, piece) => { // merge adjacent pieces of one kind into one mark
    if (list.at(-1)?.kind === kind) list.at(-1).text += piece;
    else list.push({ kind, text: piece });
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && word(a[i]) === word(b[j])) {
      put(left, "", a[i++]);
      put(right, "", b[j++]);
    } else if (j >= b.length || (i < a.length && longest[(i + 1) * width + j] >= longest[i * width + j + 1])) {
      put(left, "gone", a[i++]);
    } else {
      put(right, "added", b[j++]);
    }
  }
  return [left, right].map((list) => list.map(({ kind, text }) => (kind ? element("mark", { class: kind }, text) : text)));
}

function side(title, ...body) {
  return element("section", { class: "side" }, element("h3", {}, title), ...body);
}

function table(columns, row) {
  const lines = columns.map((column) => {
    const value = shown(cases.value(column, row), column.kind);
    const name = column.other ? `${column.name} (${cases.head.other})` : column.name;
    return value === "" ? null : element("tr", {}, element("th", { scope: "row" }, name), write(element("td"), value, view.words));
  });
  return element("table", { class: "facts" }, element("tbody", {}, ...lines));
}

function sides(row) {
  const text = cases.of("gxr_text", row);
  const edited = cases.of("gxr_review_text", row);
  const found = [];
  const own = [...cases.own.values()].filter((column) => column.own);
  const input = side(cases.head.findings, prose(cases.of(cases.head.findings, row)));
  input.append(table(own.filter((column) => column.name !== cases.head.findings), row));
  found.push(input);
  if (cases.head.other) {
    const other = cases.otherText(row);
    const marked = changes(other, text);
    const kind = marked || text === other ? "(AI)" : "(AI, too different to mark)";
    found.push(side(`Generated text, this run ${kind}`, ...laidOut(text, marked?.[1])),
      side(`Generated text, ${cases.head.other} ${kind}`, ...laidOut(other, marked?.[0])));
  } else {
    found.push(side("Generated text (AI)", ...laidOut(text)));
  }
  if (edited !== null) found.push(side("Corrected text", ...laidOut(edited, changes(text, edited)?.[1])));
  const comment = cases.of("gxr_review_comment", row);
  if (comment !== null) found.push(side("Reviewer's comment", prose(comment)));
  return element("div", { class: "sides" }, ...found);
}

function show(at) {
  opened.at = at;
  const row = view.order[at];
  byId("case-title").textContent = cases.name(row);
  byId("case-at").textContent = `${whole.format(at + 1)} of ${whole.format(view.order.length)}`;
  byId("case-back").disabled = at === 0;
  byId("case-on").disabled = at === view.order.length - 1;
  const error = cases.of("gxr_error", row);
  const reviewer = cases.of("gxr_reviewer", row);
  const by = reviewer && `by ${reviewer} on ${cases.of("gxr_reviewed_at", row) ?? "an unknown date"}`;
  const labels = element("div", { class: "labels" }, state(cases.of("gxr_status", row)), state(cases.of("gxr_review_status", row)),
    by ? write(element("span"), by) : null, cases.other.size ? state(cases.ofOther("comparison", row), "compared") : null, ...cases.flags(row).map(chip));
  const lost = cases.of("gxr_findings_lost", row) ?? [];
  const rest = [...cases.own.values()].filter((column) => !column.own && !["gxr_text", "gxr_review_text", "gxr_review_comment"].includes(column.name));
  const others = [...cases.other.values()].filter((column) => !["gxr_text", "comparison"].includes(column.name));
  byId("case-body").replaceChildren(labels,
    ...(error === null ? [] : [write(element("p", { class: "error" }), error)]),
    ...(lost.length ? [write(element("p"), `Not named in the text, or denied: ${lost.join(", ")}`)] : []),
    sides(row),
    element("details", {}, element("summary", {}, "All other columns"), table([...rest, ...others], row)));
  byId("case-body").scrollTop = 0;
  if (!byId("case").open) byId("case").showModal();
  byId("case-title").focus();
  address(`#case=${encodeURIComponent(cases.name(row))}`);
}

function address(hash) {
  try { history.replaceState(null, "", hash || location.pathname); } catch { /* some browsers refuse for files */ }
}

function step(by) {
  const at = opened.at + by;
  if (at >= 0 && at < view.order.length) show(at);
}

function closed() {
  address("#cases");
  view.page = Math.floor(opened.at / view.size);
  draw();
  focusOn(byId("rows").querySelector(`tr[data-row="${view.order[opened.at]}"] .open`));
}

function decoded(name) {
  try {
    return decodeURIComponent(name);
  } catch {
    return name; // an address typed by hand
  }
}

function openFromAddress() {
  if (!location.hash.startsWith("#case=")) return;
  const name = decoded(location.hash.slice("#case=".length));
  const at = view.order.findIndex((row) => cases.name(row) === name);
  if (at >= 0) show(at);
}
