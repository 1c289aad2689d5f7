const COLUMNS = [
  { name: "tensor", of: (l) => l.key, show: (v) => v, text: true },
  { name: "option", of: (l) => l.desc || null, show: (v) => v || "–", text: true },
  { name: "bits", of: (l, o) => o && o[O.bits], show: whole },
  { name: "bpw", of: (l, o) => o && o[O.bpw], show: (v) => (v === null ? "–" : v.toFixed(3)) },
  { name: "error", of: (l, o) => o && o[O.err], show: aligned },
  { name: "held-out error", of: (l, o) => o && o[O.heldout], show: aligned },
  { name: "loss", of: (l, o) => o && o[O.loss], show: aligned },
  { name: "sensitivity", of: (l) => l.sensitivity, show: aligned },
];
const inOrder = new Intl.Collator("en", { numeric: true }).compare;

function tensorTable(format) {
  const { root, tools } = section("tensors");
  const host = root.querySelector(".scroll"), body = h("tbody", {}), count = h("span", { class: "count", role: "status" });
  const rows = format.linears.map((l) => COLUMNS.map((column) => column.of(l, chosenOf(l)) ?? null));
  let by = -1, down = false, wanted = "";
  const show = () => {
    const kept = rows.filter((row) => `${row[0]} ${row[1]}`.toLowerCase().includes(wanted));
    if (by >= 0) kept.sort((a, b) => compare(a[by], b[by], down));
    body.replaceChildren(...kept.map((row) => h("tr", {}, ...row.map((value, i) =>
      h(i ? "td" : "th", i ? { class: COLUMNS[i].text ? "text" : null } : { scope: "row" }, COLUMNS[i].show(value))))));
    count.textContent = `${kept.length} of ${rows.length}`;
    heads.forEach((head, i) => head.setAttribute("aria-sort", i === by ? (down ? "descending" : "ascending") : "none"));
  };
  const heads = COLUMNS.map((column, i) => h("th", { scope: "col", class: column.text ? "text" : null },
    h("button", { type: "button", onclick() { down = by === i && !down; by = i; show(); } }, column.name)));
  const filter = h("input", { type: "search", placeholder: "Filter by name or option", "aria-label": "Filter tensors", oninput() { wanted = filter.value.trim().toLowerCase(); show(); } });
  tools.append(filter, count);
  host.replaceChildren(h("table", { class: "tensors" }, h("thead", {}, h("tr", {}, ...heads)), body));
  show();
}

/* What is not known stays last. */
function compare(a, b, down) {
  if (a === null || b === null) return (a === null) - (b === null);
  const order = typeof a === "string" ? inOrder(a, b) : a - b;
  return down ? -order : order;
}
