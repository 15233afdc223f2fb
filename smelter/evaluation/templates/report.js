// Values under the pointer, or under the arrow keys; the curves themselves are already in the page.
const charts = JSON.parse(document.getElementById("chart-data").textContent);
for (const plot of document.querySelectorAll(".plot")) {
  const chart = charts[plot.dataset.chart];
  const cursor = plot.querySelector(".cursor");
  const box = plot.querySelector(".values");
  const steps = [...new Set(chart.series.flatMap((s) => s.points.map((p) => p[0])))].sort((a, b) => a - b);
  let current = steps.length - 1;

  const view = () => {
    const shown = plot.closest("figure").querySelector("fieldset input:checked");
    return chart.views[shown ? shown.value : Object.keys(chart.views)[0]];
  };
  const place = (step) => {
    const { x: [low, high], logX } = view();
    const f = logX ? Math.log : (v) => v;
    return (f(step) - f(low)) / (f(high) - f(low));
  };
  const text = (value) => {
    if (value === null) return "not finite";
    const number = Number((chart.percent ? 100 * value : value).toPrecision(4));
    return number.toLocaleString("en", { maximumSignificantDigits: 4 }) + (chart.percent ? "%" : "");
  };
  const show = (index) => {
    current = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[current];
    const at = place(step);
    if (!(at >= 0 && at <= 1)) return;
    const line = (label, value) => {
      const row = document.createElement("div");
      const strong = document.createElement("b");
      strong.textContent = value;
      row.append(label + " ", strong);
      return row;
    };
    const rows = [line("step", step.toLocaleString("en"))];
    for (const series of chart.series) {
      const found = series.points.find((p) => p[0] === step);
      if (found) rows.push(line(series.name, text(found[1])));
    }
    box.replaceChildren(...rows);
    box.hidden = cursor.hidden = false;
    cursor.style.left = 100 * at + "%";
    box.style.left = at < 0.5 ? `calc(${100 * at}% + 8px)` : "auto";
    box.style.right = at < 0.5 ? "auto" : `calc(${100 * (1 - at)}% + 8px)`;
  };
  const hide = () => { box.hidden = cursor.hidden = true; };

  plot.addEventListener("pointermove", (event) => {
    const area = plot.getBoundingClientRect();
    const at = (event.clientX - area.left) / area.width;
    let best = 0;
    steps.forEach((step, i) => {
      if (Math.abs(place(step) - at) < Math.abs(place(steps[best]) - at)) best = i;
    });
    show(best);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: current - 1, ArrowRight: current + 1, Home: 0, End: steps.length - 1 };
    if (event.key in moves) {
      event.preventDefault();
      show(moves[event.key]);
    }
    if (event.key === "Escape") hide();
  });
}
