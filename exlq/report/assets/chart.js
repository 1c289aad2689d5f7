/* An axis: from values to pixels, with ticks. `log` axes need values above 0. */
function scale(values, log, from, to, pad = 0.04) {
  const f = log ? Math.log10 : (v) => v;
  let low = Infinity, high = -Infinity;
  for (const v of values) { low = Math.min(low, f(v)); high = Math.max(high, f(v)); }
  if (high - low < 1e-9) { low -= log ? 0.5 : 0.5; high += 0.5; }
  const room = (high - low) * pad;
  low -= room; high += room;
  const at = (v) => from + ((f(v) - low) / (high - low)) * (to - from);
  return { at, ticks: (log ? logTicks : linearTicks)(low, high, Math.abs(to - from)), log };
}
function linearTicks(low, high, pixels) {
  const raw = (high - low) / Math.max(2, pixels / 80);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((m) => m >= raw);
  const ticks = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-6; v += step) ticks.push(+v.toPrecision(10));
  return ticks;
}
function logTicks(low, high, pixels) {
  const factors = high - low < 1.6 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil((high - low) / Math.max(2, pixels / 36)));
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power++)
    for (const factor of factors) {
      const v = factor * 10 ** power, l = Math.log10(v);
      if (l >= low && l <= high && (factors.length > 1 || power % every === 0)) ticks.push(+v.toPrecision(3));
    }
  return ticks;
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`).join("");

/* A plot with axes. `spec`: label, x and y ({label, log, tick, values}), draw(svg, X, Y), and points
   ({x, y, lines, group, mark}) that can be hovered, or walked by the arrow keys. */
function chart(host, spec) {
  whenResized(host, () => {
    const width = Math.max(260, host.clientWidth), height = spec.height || Math.round(Math.min(420, Math.max(260, width * 0.5)));
    const box = { left: 66, right: width - 14, top: 12, bottom: height - 44 };
    const X = scale(spec.x.values, spec.x.log, box.left, box.right);
    const Y = scale(spec.y.values, spec.y.log, box.bottom, box.top);
    const svg = s("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "img",
      "aria-label": `${spec.label}. Arrow keys read the points.` });
    axes(svg, box, X, Y, spec);
    spec.draw(svg, X, Y, box);
    hover(svg, spec, X, Y);
    host.replaceChildren(svg);
  });
}

function axes(svg, box, X, Y, spec) {
  const tickX = spec.x.tick || (X.log ? power : number), tickY = spec.y.tick || (Y.log ? power : number);
  for (const v of Y.ticks) {
    const y = Y.at(v);
    svg.append(s("line", { class: "grid", x1: box.left, x2: box.right, y1: y, y2: y }),
      s("text", { class: "tick", x: box.left - 8, y: y + 4, "text-anchor": "end" }, tickY(v)));
  }
  for (const v of X.ticks) {
    const x = X.at(v);
    svg.append(s("line", { class: "stub", x1: x, x2: x, y1: box.bottom, y2: box.bottom + 4 }),
      s("text", { class: "tick", x, y: box.bottom + 18, "text-anchor": "middle" }, tickX(v)));
  }
  svg.append(s("line", { class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom }),
    s("text", { class: "name", x: (box.left + box.right) / 2, y: box.bottom + 38, "text-anchor": "middle" }, spec.x.label),
    s("text", { class: "name", x: -(box.top + box.bottom) / 2, y: 12, transform: "rotate(-90)", "text-anchor": "middle" }, spec.y.label));
}

function hover(svg, spec, X, Y) {
  const points = spec.points.map((p) => ({ ...p, px: X.at(p.x), py: Y.at(p.y) }));
  const ring = s("circle", { class: "ring", r: 7, visibility: "hidden" });
  svg.append(ring);
  let current = -1;
  const pick = (index, clientX, clientY) => {
    current = index;
    const p = points[index], frame = svg.getBoundingClientRect();
    ring.setAttribute("cx", p.px); ring.setAttribute("cy", p.py); ring.setAttribute("visibility", "visible");
    if (spec.light) spec.light(svg, p.group);
    showTip(p.lines, clientX ?? frame.left + p.px, clientY ?? frame.top + p.py);
  };
  const clear = () => {
    ring.setAttribute("visibility", "hidden");
    if (spec.light) spec.light(svg, null);
    hideTip();
  };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
    const index = nearest(points, x, y, spec.byX);
    if (index >= 0) pick(index, event.clientX, event.clientY); else clear();
  });
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("blur", clear);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step && points.length) {
      event.preventDefault();
      pick((current + step + points.length) % points.length);
    } else if (event.key === "Escape") clear();
  });
}

/* The nearest point; with `byX` the nearest mark within reach, else whatever is nearest along x. */
function nearest(points, x, y, byX) {
  let best = -1, least = Infinity;
  points.forEach((p, i) => {
    const flat = Math.hypot(p.px - x, p.py - y);
    const away = byX ? (p.mark && flat < 16 ? flat / 1e3 : 1 + Math.abs(p.px - x)) : flat;
    if (away < least) { least = away; best = i; }
  });
  return best;
}
