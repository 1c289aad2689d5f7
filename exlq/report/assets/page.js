function draw(format) {
  hideTip();
  for (const part of [frontierPlot, heatMap, errorPlot, predictedPlot, heldoutPlot, tensorTable]) part(format);
}

if (data.formats.length > 1) {
  const bar = document.getElementById("formats");
  bar.hidden = false;
  toggle(bar, "Format", data.formats.map((format) => format.label), (i) => draw(data.formats[i]));
}
draw(data.formats[0]);
addEventListener("scroll", () => Math.abs(scrollY - shownAt) > 4 && hideTip(), { passive: true });
