const METRICS = [
  { name: "bits", label: "bits per weight", of: (o) => o[O.bpw], show: bpw },
  { name: "error", label: "relative error on held-out rows", of: (o) => o[O.heldout], show: (v) => number(v, 2), log: true },
  { name: "loss", label: "loss, nats", of: (o) => o[O.loss], show: (v) => number(v, 2), log: true },
];

function heatMap(format) {
  const { root, tools, about, plot, legend } = section("map");
  const cells = format.linears.filter((l) => l.layer !== null && chosenOf(l));
  if (!cells.length) return void (root.hidden = true);
  const mix = format.result ? "what was chosen" : `a good mix at ${bpw(format.preview_bpw)} bits per weight`;
  about.textContent = `Every linear of the decoder under ${mix}. Arrow keys move through the map.`;
  let metric = METRICS[0];
  const draw = () => drawMap(plot, legend, cells, metric);
  toggle(tools, "Colour by", METRICS.map((m) => m.name), (i) => { metric = METRICS[i]; draw(); });
  whenResized(plot, draw);
}

function drawMap(plot, legend, cells, metric) {
  const layers = [...new Set(cells.map((l) => l.layer))].sort((a, b) => a - b), kinds = [...new Set(cells.map((l) => l.kind))];
  const wide = plot.clientWidth >= 600, across = wide ? layers : kinds, down = wide ? kinds : layers;
  const at = new Map(cells.map((l) => [`${l.layer} ${l.kind}`, l]));
  const shade = shades(cells.map((l) => metric.of(chosenOf(l))), metric.log);
  const room = Math.min(132, (plot.clientWidth - 96) / across.length), written = room >= 40;
  const every = [1, 2, 4, 5, 8, 10, 20].find((n) => n * room >= 22) || 40;
  const grid = h("div", { class: `map${written ? "" : " plain"}`, role: "grid", "aria-label": `Map of ${metric.label}` });
  grid.style.gridTemplateColumns = `auto repeat(${across.length}, minmax(11px, 132px))`;
  grid.append(h("span", {}), ...across.map((name, i) => h("span", { class: "across" }, wide ? (i % every ? "" : String(name)) : name.replace(/_proj$/, ""))));
  const nodes = [];
  for (const name of down) {
    grid.append(h("span", { class: "down" }, wide ? name : `layer ${name}`));
    nodes.push(across.map((other) => {
      const linear = at.get(wide ? `${other} ${name}` : `${name} ${other}`);
      const node = linear ? cell(linear, metric, shade, written) : h("span", {});
      grid.append(node);
      return node;
    }));
  }
  walkable(grid, nodes);
  plot.replaceChildren(h("div", { class: "scroll" }, grid));
  legend.replaceChildren(h("span", { class: "key" }, metric.show(shade.low), h("i", { class: "ramp" }), metric.show(shade.high)),
    h("span", { class: "key" }, metric.label + (metric.log ? ", log scale" : "")));
}

function shades(values, log) {
  const f = log ? (v) => Math.log(Math.max(v, 1e-30)) : (v) => v;
  const low = Math.min(...values), high = Math.max(...values), span = f(high) - f(low);
  return { low, high, of: (v) => (span > 1e-9 ? (f(v) - f(low)) / span : 0.5) };
}

function cell(linear, metric, shade, written) {
  const option = chosenOf(linear), value = metric.of(option), t = shade.of(value);
  const below = t < 0.5, part = Math.round(100 * (below ? 2 * t : 2 * t - 1));
  const colour = `color-mix(in oklab, var(--heat-${below ? "mid" : "high"}) ${part}%, var(--heat-${below ? "low" : "mid"}))`;
  const node = h("button", { type: "button", role: "gridcell", tabindex: -1, class: `cell ${t > 0.62 ? "deep" : t > 0.3 ? "half" : ""}`, background: colour,
    "aria-label": `${linear.key}: ${option[O.desc]}, ${metric.show(value)}` }, written ? metric.show(value) : "");
  const tell = (event) => {
    const frame = node.getBoundingClientRect();
    showTip(optionLines(linear, option), event.clientX || frame.right, event.clientY || frame.bottom);
  };
  for (const name of ["pointermove", "focus", "click"]) node.addEventListener(name, tell);
  for (const name of ["pointerleave", "blur"]) node.addEventListener(name, hideTip);
  return node;
}

/* One stop of the tab key; arrows move inside. */
function walkable(grid, nodes) {
  if (nodes[0][0].matches("button")) nodes[0][0].tabIndex = 0;
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
    const row = nodes.findIndex((line) => line.includes(event.target));
    if (!step || row < 0) return;
    event.preventDefault();
    const next = (nodes[row + step[0]] || [])[nodes[row].indexOf(event.target) + step[1]];
    if (next && next.matches("button")) {
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  });
}
