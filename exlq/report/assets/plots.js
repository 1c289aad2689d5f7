const BPW = 0, BYTES = 1, KL = 2, SE = 3; // of a SizePoint
const O = { desc: 0, bits: 1, bpw: 2, err: 3, heldout: 4, loss: 5 }; // of an OptionPoint
const HUES = 8;

const chosenOf = (linear) => (linear.chosen === null ? null : linear.options[linear.chosen]);

function swatch(className, text, hue) {
  return h("span", { class: "key" }, h("i", { class: className, ...(hue ? { "--hue": hue } : {}) }), text);
}

function frontierPlot(format) {
  const { root, tools, about, plot, legend } = section("frontier");
  const marks = [["chosen", "predicted", format.chosen], ["measured", "measured", format.measured]].filter((m) => m[2]);
  if (!format.frontier.length) return void (root.hidden = true);
  about.textContent = format.result
    ? "The line is the best predicted trade at every size, head and embedding as they were chosen; the band is one standard error of the prediction."
    : "The line is the best predicted trade at every size of the decoder's linears, head and embedding left out; the band is one standard error of the prediction.";
  const draw = (by) => {
    const all = [...format.frontier, ...marks.map((m) => m[2])];
    const low = (p) => Math.max(p[KL] - p[SE], p[KL] / 3);
    chart(plot, {
      label: "KL divergence by size", byX: true,
      x: { label: by === BPW ? "bits per weight" : "size", values: all.map((p) => p[by]), tick: by === BPW ? undefined : size },
      y: { label: "KL divergence, nats", log: true, values: all.flatMap((p) => [low(p), p[KL] + p[SE]]) },
      draw(svg, X, Y) {
        const line = format.frontier, at = (p, v) => [X.at(p[by]), Y.at(v)];
        const band = [...line.map((p) => at(p, p[KL] + p[SE])), ...line.map((p) => at(p, low(p))).reverse()];
        svg.append(s("path", { class: "band", d: `${path(band)}Z` }), s("path", { class: "line main", d: path(line.map((p) => at(p, p[KL]))) }));
        for (const [name, , p] of marks) {
          const [x, y] = at(p, p[KL]);
          svg.append(s("path", { class: `bar ${name}`, d: path([at(p, low(p)), at(p, p[KL] + p[SE])]) }));
          svg.append(name === "chosen" ? s("circle", { class: "dot chosen", cx: x, cy: y, r: 6 })
            : s("path", { class: "dot measured", d: `M${x},${y - 8}L${x + 8},${y}L${x},${y + 8}L${x - 8},${y}Z` }));
        }
      },
      points: [
        ...format.frontier.map((p) => ({ x: p[by], y: p[KL], lines: [`${bpw(p[BPW])} bits per weight`, size(p[BYTES]), `predicted ${nats(p[KL], p[SE])}`] })),
        ...marks.map(([, word, p]) => ({ x: p[by], y: p[KL], mark: true, lines: [`This model, ${word}`, `${bpw(p[BPW])} bits per weight, ${size(p[BYTES])}`, nats(p[KL], p[SE])] })),
      ],
    });
  };
  toggle(tools, "Size as", ["bits per weight", "bytes"], (i) => draw(i ? BYTES : BPW));
  legend.append(swatch("line", "best predicted"));
  for (const [name, word] of marks) legend.append(swatch(name, `this model, ${word}`));
  draw(BPW);
}

function errorPlot(format) {
  const { root, about, plot, legend } = section("errors");
  const linears = format.linears.map((l) => ({ ...l, options: l.options.filter((o) => o[O.err] > 0) })).filter((l) => l.options.length);
  if (!linears.length) return void (root.hidden = true);
  about.textContent = "Each line is a linear: the relative error of its output under its options, only those that no other beats. Dots mark what was chosen.";
  const kinds = [...new Set(linears.map((l) => l.kind))];
  const hue = (kind) => `var(--hue-${kinds.indexOf(kind) % HUES})`;
  let only = null;
  const light = (svg, key) => {
    svg.classList.toggle("dim", key !== null || only !== null);
    for (const node of svg.querySelectorAll("[data-key]"))
      node.classList.toggle("lit", key === null ? node.dataset.kind === only : node.dataset.key === key);
  };
  const draw = () => {
    const seen = linears.filter((l) => only === null || l.kind === only), all = linears.flatMap((l) => l.options);
    chart(plot, {
      label: "Error by bits per weight of every linear",
      x: { label: "bits per weight", values: all.map((o) => o[O.bpw]) },
      y: { label: "relative error", log: true, values: all.map((o) => o[O.err]) },
      light,
      draw(svg, X, Y) {
        for (const l of linears) {
          const best = undominated(l.options), mark = { "data-key": l.key, "data-kind": l.kind, "--hue": hue(l.kind) };
          svg.append(s("path", { class: linears.length > 80 ? "line linear many" : "line linear", ...mark, d: path(best.map((o) => [X.at(o[O.bpw]), Y.at(o[O.err])])) }));
        }
        for (const l of format.linears) {
          const o = chosenOf(l);
          if (o && o[O.err] > 0) svg.append(s("circle", { class: "dot small", "data-key": l.key, "data-kind": l.kind, "--hue": hue(l.kind), cx: X.at(o[O.bpw]), cy: Y.at(o[O.err]), r: 3.5 }));
        }
        light(svg, null);
      },
      points: seen.flatMap((l) => l.options.map((o) => ({ x: o[O.bpw], y: o[O.err], group: l.key, lines: optionLines(l, o) }))),
    });
  };
  for (const kind of kinds) {
    const button = h("button", { type: "button", class: "key", "aria-pressed": false, onclick() {
      only = only === kind ? null : kind;
      for (const other of legend.children) other.setAttribute("aria-pressed", other === button && only !== null);
      draw();
    } }, h("i", { class: "line", "--hue": hue(kind) }), kind);
    legend.append(button);
  }
  draw();
}

function optionLines(linear, option) {
  return [linear.key, `${option[O.desc]}, ${bpw(option[O.bpw])} bits per weight`,
    `error ${number(option[O.err])}, on held-out rows ${number(option[O.heldout])}`, `loss ${number(option[O.loss])}`];
}

function undominated(options) {
  const kept = [];
  for (const o of [...options].sort((a, b) => a[O.bpw] - b[O.bpw] || a[O.err] - b[O.err]))
    if (!kept.length || o[O.err] < kept[kept.length - 1][O.err]) kept.push(o);
  return kept;
}

/* Points on two log axes of one unit, with the line on which both are equal. */
function equalPlot(plot, spec) {
  const reached = spec.points.flatMap((p) => [p.x, p.y, ...(p.span || []).flat()]);
  const values = [Math.min(...reached) / 1.5, Math.max(...reached) * 1.5];
  const axis = (label) => ({ label, log: true, values });
  chart(plot, {
    ...spec, height: 320, x: axis(spec.xLabel), y: axis(spec.yLabel),
    draw(svg, X, Y) {
      const [low, high] = values;
      svg.append(s("path", { class: "equal", d: path([[X.at(low), Y.at(low)], [X.at(high), Y.at(high)]]) }));
      for (const p of spec.points) {
        if (p.span) svg.append(s("path", { class: "bar", d: path(p.span[0].map((v) => [X.at(v), Y.at(p.y)])) + path(p.span[1].map((v) => [X.at(p.x), Y.at(v)])) }));
        svg.append(s("circle", { class: "dot point", cx: X.at(p.x), cy: Y.at(p.y), r: p.span ? 5.5 : 4 }));
      }
    },
  });
}

function predictedPlot(format) {
  const { root, about, plot } = section("predicted");
  const span = (v, se) => [Math.max(v - se, v / 3), v + se];
  const points = format.evaluations.filter(([, p, , m]) => p > 0 && m > 0).map(([name, p, pSe, m, mSe]) => ({
    x: p, y: m, span: [span(p, pSe), span(m, mSe)], lines: [name, `predicted ${nats(p, pSe)}`, `measured ${nats(m, mSe)}`] }));
  if (!points.length) return void (root.hidden = true);
  about.textContent = `KL divergence of every conversion that the measurement records (${points.length}), with standard errors. On the dashed line both are equal.`;
  equalPlot(plot, { label: "Predicted and measured KL divergence", xLabel: "predicted, nats", yLabel: "measured, nats", points });
}

function heldoutPlot(format) {
  const { root, about, plot } = section("heldout");
  const points = format.linears.map((l) => [l, chosenOf(l)]).filter(([, o]) => o && o[O.err] > 0 && o[O.heldout] > 0)
    .map(([l, o]) => ({ x: o[O.err], y: o[O.heldout], lines: optionLines(l, o) }));
  if (!points.length) return void (root.hidden = true);
  const gap = 100 * format.heldout_gap;
  about.textContent = `Error of the chosen options on rows that rounding has seen and on rows it has not: in the median ${Math.abs(gap).toFixed(1)} % ${gap < 0 ? "smaller" : "larger"} on the latter. On the dashed line both are equal.`;
  equalPlot(plot, { label: "Errors on calibration and held-out rows", xLabel: "error on calibration rows", yLabel: "on held-out rows", points });
}
