const data = JSON.parse(document.getElementById("data").textContent);
const SVG = document.getElementById("mark").namespaceURI;
const tip = document.getElementById("tip");

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--") || name === "background") node.style.setProperty(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children); // strings become text, never markup
  return node;
}
const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const s = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

function number(value, digits = 3, least = 1) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-4 || size >= 1e6) return value.toExponential(digits - 1).replace("-", "−").replace("+", "");
  return value.toLocaleString("en", { maximumSignificantDigits: digits, minimumSignificantDigits: least });
}
/* A tick of a log axis, small powers as 10⁻⁴. */
function power(value) {
  if (value >= 1e-3) return number(value);
  const exponent = Math.floor(Math.log10(value) + 1e-9), factor = Math.round(value / 10 ** exponent);
  const raised = String(-exponent).replace(/./g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit]);
  return `${factor === 1 ? "" : `${factor}·`}10⁻${raised}`;
}
const aligned = (value) => number(value, 3, 3);
const whole = (value) => (value === null ? "–" : Math.round(value).toLocaleString("en"));
const bpw = (value) => value.toFixed(value < 10 ? 2 : 1);
const nats = (value, se) => `${number(value)} ± ${number(se, 2)} nats`;
function size(bytes) {
  let unit = 0;
  for (; bytes >= 1024 && unit < 4; unit++) bytes /= 1024;
  return `${unit ? bytes.toFixed(2) : bytes} ${["B", "KiB", "MiB", "GiB", "TiB"][unit]}`;
}

let shownAt = 0; // scrollY when the tip was shown
function showTip(lines, x, y) {
  shownAt = scrollY;
  tip.replaceChildren(...lines.map((line, i) => h(i ? "div" : "strong", {}, line)));
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = x + 14 + width > innerWidth ? x - 14 - width : x + 14;
  const top = y + 14 + height > innerHeight ? y - 14 - height : y + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}
const hideTip = () => (tip.hidden = true);

/* A row of buttons of which one is pressed; `choose` is told which. */
function toggle(host, label, choices, choose, pressed = 0) {
  const buttons = choices.map((text, i) =>
    h("button", { type: "button", "aria-pressed": i === pressed, onclick: () => press(i) }, text));
  const press = (index) => {
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === index));
    choose(index);
  };
  host.append(h("div", { class: "toggle", role: "group", "aria-label": label }, ...buttons));
}

/* Where a section draws: its parts, emptied. */
function section(id) {
  const root = document.getElementById(id);
  const part = (name) => {
    const found = root.querySelector(name);
    if (found) found.replaceChildren();
    return found;
  };
  root.hidden = false;
  return { root, tools: part(".tools"), about: part(".about"), plot: part(".plot"), legend: part(".legend") };
}

/* Draws now and whenever the host changes its width, until the next `whenResized` of it. */
const watched = new Map();
const observer = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    const seen = watched.get(target);
    if (seen && Math.abs(seen.width - contentRect.width) > 1) {
      seen.width = contentRect.width;
      seen.draw();
    }
  }
});
function whenResized(host, draw) {
  watched.set(host, { draw, width: host.clientWidth });
  observer.observe(host);
  draw();
}
