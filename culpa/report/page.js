"use strict";
(() => {
  const options = {
    renderer: "svg",
    ast: true, // expressions are interpreted, never compiled: the page's policy forbids eval
    actions: false,
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true, id: "chart-tooltip" },
  };
  const views = new Map();
  const root = document.documentElement;

  const draw = async (box) => {
    if (views.has(box)) return;
    views.set(box, null);
    try {
      const spec = JSON.parse(document.getElementById("spec-" + box.dataset.chart).textContent);
      views.set(box, (await vegaEmbed(box, spec, options)).view);
    } catch (error) {
      box.textContent = "This chart could not be drawn; its numbers are in the table below it.";
      console.error(error);
    }
  };

  // One strip at a time: the chosen behaviour.
  const chooser = document.getElementById("strip-behaviour");
  const panels = [...document.querySelectorAll("[data-strip]")];
  const choose = (index) => {
    for (const panel of panels) panel.hidden = panel.dataset.strip !== index;
    const shown = panels.find((panel) => !panel.hidden);
    const box = shown && shown.querySelector("[data-chart]");
    return box ? draw(box) : Promise.resolve();
  };
  if (chooser) chooser.addEventListener("change", () => choose(chooser.value));

  // The same zoom and pan by keyboard as by pointer.
  const moves = {
    in: (a, b) => [a + (b - a) / 4, b - (b - a) / 4],
    out: (a, b) => [a - (b - a) / 2, b + (b - a) / 2],
    earlier: (a, b) => [a - (b - a) / 4, b - (b - a) / 4],
    later: (a, b) => [a + (b - a) / 4, b + (b - a) / 4],
  };
  for (const button of document.querySelectorAll("[data-move]")) {
    button.addEventListener("click", () => {
      const box = button.closest("[data-strip]").querySelector("[data-chart]");
      const view = views.get(box);
      if (!view) return;
      const last = Number(box.dataset.updates) - 0.5;
      const move = moves[button.dataset.move];
      let range = null; // no range: the whole run
      if (move) {
        const [a, b] = move(...view.scale("x").domain());
        const width = Math.min(b - a, last + 0.5);
        const start = Math.min(Math.max(a, -0.5), last - width);
        range = width >= 1 ? [start, start + width] : view.scale("x").domain();
      }
      view.signal("zoom_k", range).runAsync();
    });
  }

  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details[data-print]")) details.open = true;
  });

  const bars = [...document.querySelectorAll(".bars [data-chart]")];
  Promise.all([...bars.map(draw), choose(chooser ? chooser.value : "0")]).then(() => {
    root.dataset.charts = "drawn";
  });
})();
