// Draws the page's plots with Observable Plot from the JSON in #data. The tables hold the same
// numbers; nothing here computes any. Each plot is drawn again when its width changes, answers to
// the pointer with a tip, and to the arrow keys with the same tip and a spoken reading.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => `var(--${name})`;
  const number = (x) => (x === 0 ? "0" : Math.abs(x) >= 1e-3 && Math.abs(x) < 1e4
    ? String(+x.toPrecision(3)) : x.toExponential(1).replace(".0e", "e")).replaceAll("-", "\u2212");
  const percent = (x, places = 1) => `${(100 * x).toFixed(places)}%`;
  const points = (x, unit = "points") => `${x > 0 ? "+" : x < 0 ? "\u2212" : ""}`
    + (unit ? `${Math.abs(x).toFixed(2)} ${unit}` : number(Math.abs(x)));
  const shorten = (name, limit) => name.length <= limit ? name
    : `${name.slice(0, Math.ceil(limit / 2) - 1)}\u2026${name.slice(1 - Math.floor(limit / 2))}`;

  // Room on the left for names on the vertical axis: a third of the width at most.
  function naming(names, width) {
    const limit = Math.max(8, Math.floor(width / 3 / 7));
    const longest = Math.max(...names.map((n) => Math.min(n.length, limit)));
    return { marginLeft: 18 + 6.8 * longest, format: (n) => shorten(n, limit) };
  }
  // A logarithmic axis over positive values: whole decades, or 1, 2 and 5 where they are few.
  function logarithmic(values, room) {
    const low = Math.min(...values), high = Math.max(...values);
    const decades = Math.log10(high / low);
    const steps = decades > room / 2 ? [1] : decades > room / 3 ? [1, 3] : [1, 2, 5];
    const ticks = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
      for (const step of steps) ticks.push(step * 10 ** e);
    }
    const seen = ticks.filter((t) => t >= low && t <= high);
    const thin = Math.ceil(seen.length / Math.max(room, 2));
    return { type: "log", grid: true, tickFormat: number,
      ticks: seen.length > 1 ? seen.filter((_, i) => i % thin === 0) : [low, high] };
  }
  const rows = (names, each = 21) => 52 + each * names.length;

  function draw(id, items, make, options = {}) {
    const figure = document.getElementById(id);
    if (!figure) return;
    if (!items.length) { figure.remove(); return; }
    const canvas = figure.querySelector(".canvas");
    const readout = figure.querySelector(".readout");
    let width = 0, svg = null, at = -1;

    function render() {
      width = canvas.clientWidth - 16;
      const built = make(Math.max(width, 240));
      const point = (options) => Plot[built.pointer ?? "pointer"](
        { x: built.at.x, y: built.at.y, maxRadius: 60, ...options });
      const place = (d, key, fallback) => d[built.at[key]] ?? fallback;
      const plot = Plot.plot({
        width: Math.max(width, 240), marginTop: 10, marginBottom: 42, insetLeft: 2, style: { background: "none", color: "currentColor" },
        ...built.plot,
        marks: [...built.plot.marks, Plot.dot(items, point({ r: 7, stroke: "currentColor" })),
          Plot.tip(items, point({ title: built.title, fill: css("card"), stroke: css("before"),
            textPadding: 9, lineHeight: 1.35, lineWidth: 30 }))],
      });
      const drawn = plot instanceof SVGElement ? plot : plot.querySelector("svg:last-of-type");
      drawn.setAttribute("aria-hidden", "true");
      const parts = built.legend ? [legend(built.legend), plot] : [plot];
      canvas.replaceChildren(...parts);
      svg = drawn;
      svg.show = (i) => {
        const d = items[i];
        const spot = new DOMPoint(plot.scale("x").apply(place(d, "x", 0)) + half(plot, "x"),
          plot.scale("y").apply(place(d, "y", 0)) + half(plot, "y"))
          .matrixTransform(svg.getScreenCTM());
        const event = { clientX: spot.x, clientY: spot.y, pointerType: "mouse", bubbles: true };
        svg.dispatchEvent(new PointerEvent("pointerenter", event));
        svg.dispatchEvent(new PointerEvent("pointermove", event));
        readout.textContent = built.title(d).replaceAll("\n", ", ");
      };
      svg.hide = () => svg.dispatchEvent(new PointerEvent("pointerleave", { pointerType: "mouse" }));
      if (options.choose) {
        canvas.classList.add("clickable");
        svg.addEventListener("click", () => plot.value && options.choose(plot.value));
      }
    }
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) at = (at + step + (at < 0 && step < 0 ? 1 : 0) + items.length) % items.length;
      else if (event.key === "Home") at = 0;
      else if (event.key === "End") at = items.length - 1;
      else if (event.key === "Enter" && options.choose && at >= 0) { options.choose(items[at]); return; }
      else return;
      event.preventDefault();
      svg.show(at);
    });
    canvas.addEventListener("blur", () => svg.hide());
    render();
    new ResizeObserver(() => {
      if (Math.abs(canvas.clientWidth - 16 - width) > 1) render();
    }).observe(canvas);
    return render;
  }
  const half = (plot, axis) => (plot.scale(axis).bandwidth ?? 0) / 2;

  function legend(entries) {
    const box = document.createElement("div");
    box.className = "legend";
    for (const [text, colour, kind] of entries) {
      const item = document.createElement("span"), swatch = document.createElement("i");
      swatch.style.background = swatch.style.borderColor = colour;
      if (kind) swatch.className = kind;
      item.append(swatch, text);
      box.append(item);
    }
    return box;
  }

  // Bars of what a layer cost and costs; `unit` divides, `show` writes a value.
  function costs(id, items, dense, now, unit, label, show) {
    draw(id, items, (width) => {
      const names = items.map((d) => d.name), axis = naming(names, width);
      return {
        at: { x: "end", y: "name" }, pointer: "pointerY",
        title: (d) => `${d.name}\n${show(d[dense])} \u2192 ${show(d[now])}`,
        legend: [["before", css("before"), "bar hollow"], ["rewritten", css("accent"), "bar"],
          ...(items.every((d) => d.rewritten) ? [] : [["kept", css("kept"), "bar"]])],
        plot: {
          height: rows(names), marginLeft: axis.marginLeft,
          x: { label, grid: true, zero: true, ticks: width / 110 },
          y: { domain: names, label: null, tickFormat: axis.format, padding: 0.3 },
          marks: [
            Plot.barX(items, { x: (d) => d[now] / unit, y: "name", fill: (d) => css(d.rewritten ? "accent" : "kept") }),
            Plot.barX(items, { x: (d) => d[dense] / unit, y: "name", stroke: css("before"), strokeWidth: 1.3, fill: "none" }),
          ],
        },
      };
    });
  }

  function drop() {
    const d = data.drop;
    const item = { ...d, row: "" };
    const ends = [d.low, d.high, 0, ...(d.limit === null ? [] : [d.limit])];
    const pad = 0.12 * (Math.max(...ends) - Math.min(...ends));
    draw("plot-drop", [item], (width) => ({
      at: { x: "change", y: "row" },
      title: () => `${points(d.change, d.unit)}\n95%: ${points(d.low, d.unit)} to ${points(d.high, d.unit)}`,
      plot: {
        height: 104, marginTop: 24, marginLeft: 24, marginRight: 24,
        x: { label: d.unit || null, domain: [Math.min(...ends) - pad, Math.max(...ends) + pad], ticks: width / 90 },
        y: { domain: [""], axis: null },
        marks: [
          Plot.ruleX([0], { stroke: css("soft") }),
          ...(d.limit === null ? [] : [
            Plot.ruleX([d.limit], { stroke: css("loss"), strokeDasharray: "4 3" }),
            Plot.text([d.limit], { x: (v) => v, text: () => "limit", frameAnchor: "top", dy: -14, fill: css("loss") })]),
          Plot.link([item], { x1: "low", x2: "high", y1: "row", y2: "row", stroke: css("accent"), strokeWidth: 3, strokeLinecap: "round" }),
          Plot.dot([item], { x: "change", y: "row", r: 6, fill: css("accent") }),
        ],
      },
    }));
  }

  function classes() {
    const items = data.classes.filter((d) => d.change !== null);
    const colour = (d) => css(d.change < 0 ? "loss" : "gain");
    draw("plot-classes", items, (width) => {
      const names = items.map((d) => d.name), axis = naming(names, width);
      return {
        at: { x: "change", y: "name" }, pointer: "pointerY",
        title: (d) => `${d.name}, ${d.images} images\n${percent(d.before)} \u2192 ${percent(d.after)}: ${points(d.change)}`,
        plot: {
          height: rows(names), marginLeft: axis.marginLeft, marginRight: 24,
          x: { label: "points", grid: true, ticks: width / 120, nice: true },
          y: { domain: names, label: null, tickFormat: axis.format },
          marks: [
            Plot.ruleX([0], { stroke: css("soft") }),
            Plot.ruleY(items, { x1: 0, x2: "change", y: "name", stroke: colour, strokeWidth: 2 }),
            Plot.dot(items, { x: "change", y: "name", fill: colour, r: 4.5 }),
          ],
        },
      };
    });
  }

  function calibration() {
    const of = (which) => data.bins.filter((d) => d.which === which);
    const share = { domain: [0, 1], tickFormat: (v) => percent(v, 0), ticks: 5, grid: true };
    const dots = { x: "confidence", y: "accuracy", r: "images", fillOpacity: 0.85 };
    draw("plot-calibration", data.bins, (width) => ({
      at: { x: "confidence", y: "accuracy" },
      title: (d) => `${d.which}: ${d.images} images\nconfidence ${percent(d.confidence)}\naccuracy ${percent(d.accuracy)}`,
      legend: [["before", css("before")], ["after", css("accent")]],
      plot: {
        height: Math.min(width, 420), marginLeft: 48, marginRight: 24, marginTop: 24,
        x: { ...share, label: "confidence" }, y: { ...share, label: "accuracy" }, r: { range: [2.5, 11] },
        marks: [
          Plot.link([0], { x1: 0, y1: 0, x2: 1, y2: 1, stroke: css("soft"), strokeDasharray: "4 3" }),
          Plot.line(of("before"), { x: "confidence", y: "accuracy", stroke: css("before"), strokeOpacity: 0.35 }),
          Plot.line(of("after"), { x: "confidence", y: "accuracy", stroke: css("accent"), strokeOpacity: 0.35 }),
          Plot.dot(of("before"), { ...dots, fill: css("before") }),
          Plot.dot(of("after"), { ...dots, fill: css("accent") }),
        ],
      },
    }));
  }

  const ERRORS = [["predicted", "predicted", "accent", "hollow"], ["alone", "measured, original input", "before"], ["in_place", "measured, in place", "loss"]];
  function errors() {
    const items = data.layers.flatMap((layer) => ERRORS
      .filter(([key]) => layer[key] > 0)
      .map(([key, label]) => ({ name: layer.name, kind: key, label, value: layer[key] })));
    const of = (key) => items.filter((d) => d.kind === key);
    draw("plot-errors", items, (width) => {
      const names = [...new Set(items.map((d) => d.name))], axis = naming(names, width);
      return {
        at: { x: "value", y: "name" },
        title: (d) => `${d.name}\n${d.label}: ${number(d.value)}`,
        legend: ERRORS.filter(([key]) => of(key).length).map(([, label, colour, kind]) => [label, css(colour), kind]),
        plot: {
          height: rows(names), marginLeft: axis.marginLeft, marginRight: 24,
          x: { ...logarithmic(items.map((d) => d.value), width / 110), label: "relative mean squared error" }, inset: 6,
          y: { domain: names, label: null, tickFormat: axis.format, grid: true },
          marks: [
            Plot.dot(of("alone"), { x: "value", y: "name", r: 4, fill: css("before") }),
            Plot.dot(of("in_place"), { x: "value", y: "name", r: 4, fill: css("loss") }),
            Plot.dot(of("predicted"), { x: "value", y: "name", r: 5, stroke: css("accent"), strokeWidth: 1.8 }),
          ],
        },
      };
    });
  }

  function ranks() {
    const items = data.layers.filter((d) => d.rank_share !== null);
    const breaking = items.filter((d) => d.break_even_share !== null);
    draw("plot-ranks", items, (width) => {
      const names = items.map((d) => d.name), axis = naming(names, width);
      return {
        at: { x: "rank_share", y: "name" }, pointer: "pointerY",
        title: (d) => `${d.name}\n${d.scheme.replaceAll("_", "-")} rank ${d.ranks} of ${d.full_rank}${d.width ? `\nwidth ${d.width} of ${d.shape.split(" ")[0]}` : ""}\nbreak-even ${d.break_even ?? "unknown"}`,
        legend: [["rank", css("accent")], ["break-even", css("loss"), "bar"]],
        plot: {
          height: rows(names), marginLeft: axis.marginLeft, marginRight: 24,
          x: { label: "share of full rank", domain: [0, 1], tickFormat: (v) => percent(v, 0), ticks: width / 90, grid: true },
          y: { domain: names, label: null, tickFormat: axis.format },
          marks: [
            Plot.ruleY(items, { x1: 0, x2: "rank_share", y: "name", stroke: css("accent"), strokeWidth: 2 }),
            Plot.dot(items, { x: "rank_share", y: "name", fill: css("accent"), r: 4.5 }),
            Plot.tickX(breaking, { x: "break_even_share", y: "name", stroke: css("loss"), strokeWidth: 2, inset: 3 }),
          ],
        },
      };
    });
  }

  function spectra() {
    const select = document.getElementById("choose-spectrum");
    const curve = data.spectra.flatMap((layer) => layer.values.map(([index, value]) =>
      ({ name: layer.name, index, value, cut: layer.cut, count: layer.count })));
    const items = [...curve];
    const redraw = draw("plot-spectra", items, (width) => {
      const chosen = select.value;
      items.splice(0, items.length, ...curve.filter((d) => !chosen || d.name === chosen));
      const cuts = items.filter((d) => d.index === d.cut);
      return {
        at: { x: "index", y: "value" },
        title: (d) => `${d.name}\neigenvalue ${d.index} of ${d.count}: ${number(d.value)}\n${d.cut ? `kept ${d.cut}` : "not cut"}`,
        legend: [["last one kept", css("loss")]],
        plot: {
          height: 360, marginLeft: 56, marginRight: 24, marginTop: 24,
          x: { ...logarithmic(curve.map((d) => d.index), width / 90), grid: false, label: "eigenvalue" },
          y: { ...logarithmic(curve.map((d) => d.value), 7), label: "over the largest" },
          marks: [
            ...(data.threshold > 0 ? [Plot.ruleY([data.threshold], { stroke: css("soft"), strokeDasharray: "4 3" })] : []),
            Plot.line(curve, { x: "index", y: "value", z: "name", stroke: css(chosen ? "before" : "accent"), strokeOpacity: chosen ? 0.25 : 0.55, strokeWidth: 1.3 }),
            ...(chosen ? [Plot.line(items, { x: "index", y: "value", stroke: css("accent"), strokeWidth: 2.5 })] : []),
            Plot.dot(cuts, { x: "index", y: "value", r: 4.5, fill: css("loss") }),
          ],
        },
      };
    });
    if (redraw) select.addEventListener("change", redraw);
  }

  function loss() {
    // What lies below the rounding of the larger ones is no measurement, and would stretch the axes.
    const least = (key) => 1e-6 * Math.max(...data.layers.map((d) => d[key] ?? 0));
    const items = data.layers.filter((d) => d.predicted_loss > least("predicted_loss")
      && d.measured_loss > least("measured_loss"));
    const axis = (key, room) => logarithmic(items.map((d) => d[key]), room);
    const ends = items.length ? [Math.min(...items.flatMap((d) => [d.predicted_loss, d.measured_loss])),
      Math.max(...items.flatMap((d) => [d.predicted_loss, d.measured_loss]))] : [];
    draw("plot-loss", items, (width) => ({
      at: { x: "predicted_loss", y: "measured_loss" },
      title: (d) => `${d.name}\npredicted ${number(d.predicted_loss)}\nmeasured ${number(d.measured_loss)}`,
      plot: {
        height: Math.min(width, 420), marginLeft: 56, marginRight: 24, marginTop: 24, inset: 8,
        x: { ...axis("predicted_loss", width / 110), label: "predicted" }, y: { ...axis("measured_loss", 5), label: "measured" },
        marks: [
          Plot.link([0], { x1: ends[0], y1: ends[0], x2: ends[1], y2: ends[1], stroke: css("soft"), strokeDasharray: "4 3" }),
          Plot.dot(items, { x: "predicted_loss", y: "measured_loss", r: 4.5, fill: css("accent"), fillOpacity: 0.85 }),
        ],
      },
    }));
  }

  // What the network gives with its first layers replaced, one more from row to row.
  function progressive() {
    const { metric, unit, rows: items } = data.progressive;
    const named = items.map((d) => ({ ...d, key: `${d.index}` }));
    const layerOf = new Map(named.map((d) => [d.key, d.layer]));
    const shown = (v) => (unit === "points" ? `${v.toFixed(2)}%` : `${number(v)}${unit ? ` ${unit}` : ""}`);
    draw("plot-progressive", named, (width) => {
      const axis = naming(named.map((d) => d.layer), width);
      return {
        at: { x: "value", y: "key" }, pointer: "pointerY",
        title: (d) => `${d.layer}\n${metric} ${shown(d.value)}`
          + (d.change === null ? "" : `\n${points(d.change, unit)} by this layer\n${points(d.total, unit)} in all`),
        plot: {
          height: rows(named), marginLeft: axis.marginLeft, marginRight: 24,
          x: { label: unit === "points" ? `${metric}, percent` : metric, grid: true, ticks: width / 120, nice: true },
          y: { type: "point", domain: named.map((d) => d.key), label: null, tickFormat: (k) => axis.format(layerOf.get(k)) },
          marks: [
            Plot.ruleX([named[0].value], { stroke: css("soft"), strokeDasharray: "4 3" }),
            Plot.line(named, { x: "value", y: "key", stroke: css("accent"), strokeWidth: 2 }),
            Plot.dot(named, { x: "value", y: "key", r: 4.5, fill: (d) => css(d.index ? "accent" : "before") }),
          ],
        },
      };
    });
  }

  // How far the outputs on held-out images are from the original's, while the network learns.
  function recovery() {
    const items = data.recovery.filter((d) => d.distance !== null);
    draw("plot-recovery", items, (width) => ({
      at: { x: "step", y: "distance" }, pointer: "pointerX",
      title: (d) => `step ${d.step}\ndistance ${number(d.distance)}${d.kept ? "\nkept" : ""}`,
      legend: [["every look", css("accent")], ["kept", css("loss"), "hollow"]],
      plot: {
        height: 300, marginLeft: 56, marginRight: 24, marginTop: 26, inset: 8,
        x: { label: "steps", ticks: width / 110, nice: true },
        y: { label: "distance", grid: true, nice: true, tickFormat: number },
        marks: [
          Plot.ruleY([items[0].distance], { stroke: css("soft"), strokeDasharray: "4 3" }),
          Plot.line(items, { x: "step", y: "distance", stroke: css("accent"), strokeWidth: 2 }),
          Plot.dot(items, { x: "step", y: "distance", r: 4, fill: css("accent") }),
          Plot.dot(items.filter((d) => d.kept), { x: "step", y: "distance", r: 8, stroke: css("loss"), strokeWidth: 2 }),
        ],
      },
    }));
  }

  function show(point) {
    const box = document.getElementById("chosen");
    const title = document.createElement("h3"), line = document.createElement("p");
    const list = document.createElement("ul");
    title.textContent = point.label;
    const d = data.points[point.index];
    const said = (of, where) => `${where}${of.accuracy}`
      + (of.change === null ? "" : `, ${gained({ ...d, ...of })}`);
    line.textContent = `MACs \u00d7${d.macs_ratio?.toFixed(2) ?? "?"}; `
      + said(d, d.on_test ? "validation " : "") + (d.on_test ? `; ${said(d.on_test, "test ")}` : "");
    for (const layer of point.layers) {
      const item = document.createElement("li"), name = document.createElement("code");
      const what = document.createElement("span");
      name.textContent = layer.name;
      what.textContent = layer.treatment;
      item.append(name, what);
      list.append(item);
    }
    box.replaceChildren(title, line, list);
  }
  const gained = (d) => points(d.change, d.unit);

  function curve() {
    const select = document.getElementById("choose-set");
    // The same points as one set of images or the other sees them; the front stays validation's.
    const seen = (set) => data.points.map((d) => set ? { ...d, ...d[set] } : d)
      .filter((d) => d.change !== null && d.macs_ratio !== null);
    const items = seen("");
    const every = select ? [...items, ...seen("on_test")] : items;
    const [least, most] = d3.extent(items, (d) => d.macs_ratio);
    const domain = least === most ? { domain: [least - 0.05, most + 0.05] } : { nice: true };
    const heights = d3.extent([0, ...every.flatMap((d) => [d.change, d.low ?? d.change, d.high ?? d.change])]);
    const redraw = draw("plot-points", items, (width) => {
      items.splice(0, items.length, ...seen(select?.value ?? ""));
      const front = items.filter((d) => d.pareto).sort((a, b) => a.macs_ratio - b.macs_ratio);
      const ranged = items.filter((d) => d.low !== null);
      return {
        at: { x: "macs_ratio", y: "change" },
        title: (d) => `${d.label}\nMACs \u00d7${d.macs_ratio.toFixed(3)}\n${d.accuracy}, ${gained(d)}`,
        legend: [...(front.length ? [["Pareto front", css("accent")], ["other", css("before")]] : [["result", css("before")]]),
          ...(items.some((d) => d.chosen) ? [["chosen", css("loss"), "hollow"]] : [])],
        plot: {
          height: 400, marginLeft: 52, marginRight: 24, marginTop: 26,
          x: { ...domain, label: "MACs over the original's", grid: true, ticks: width / 90, tickFormat: (v) => v.toFixed(2) },
          y: { label: `change of ${items[0].metric}${items[0].unit ? `, ${items[0].unit}` : ""}`,
            grid: true, nice: true, ...(heights[0] < heights[1] ? { domain: heights } : {}) },
          marks: [
            Plot.ruleY([0], { stroke: css("soft") }),
            Plot.link(ranged, { x1: "macs_ratio", x2: "macs_ratio", y1: "low", y2: "high", stroke: css("before"), strokeOpacity: 0.6, strokeWidth: 1.5 }),
            Plot.line(front, { x: "macs_ratio", y: "change", stroke: css("accent"), strokeWidth: 1.5 }),
            Plot.dot(items, { x: "macs_ratio", y: "change", r: 5.5, fill: (d) => css(d.pareto ? "accent" : "before") }),
            Plot.dot(items.filter((d) => d.chosen), { x: "macs_ratio", y: "change", r: 10, stroke: css("loss"), strokeWidth: 2 }),
            ...(data.points.length <= 3 ? [Plot.text(items, { x: "macs_ratio", y: "change", text: "label", dy: -14, fill: "currentColor" })] : []),
          ],
        },
      };
    }, { choose: show });
    if (redraw && select) select.addEventListener("change", redraw);
    for (const button of document.querySelectorAll("button[data-point]")) {
      button.addEventListener("click", () => {
        show(data.points[Number(button.dataset.point)]);
        document.getElementById("chosen").scrollIntoView({ block: "nearest" });
      });
    }
    const chosen = data.points.find((d) => d.chosen);
    if (chosen) show(chosen);
  }

  // Files in float and in eight bits, dense and of low rank, by what one of their costs is.
  function files(id, cost, front, label) {
    const looks = new Map([["dense, float", ["before", "square"]], ["dense, eight bits", ["loss", "square"]],
      ["low rank, float", ["accent", "circle"]], ["low rank, eight bits", ["loss", "circle"]]]);
    const items = data.files.filter((d) => d[cost] !== null);
    draw(id, items, (width) => ({
      at: { x: cost, y: "change" },
      title: (d) => `${d.label}, ${d.kind.split(", ")[1]}\n${label} \u00d7${d[cost].toFixed(3)}\n${d.shown}, ${points(d.change, d.unit)}`,
      legend: [...looks].map(([kind, [colour, shape]]) => [kind, css(colour), shape === "square" ? "bar" : ""]),
      plot: {
        height: 360, marginLeft: 52, marginRight: 24, marginTop: 26,
        x: { label: `${label} over the dense network's in float`, grid: true, nice: true, ticks: width / 90, tickFormat: (v) => v.toFixed(2) },
        y: { label: `change, ${items[0].unit}`, grid: true, nice: true },
        marks: [
          Plot.ruleY([0], { stroke: css("soft") }),
          ...["low rank, float", "low rank, eight bits"].map((kind) => Plot.line(
            items.filter((d) => d.kind === kind).sort((a, b) => a[cost] - b[cost]),
            { x: cost, y: "change", stroke: css(looks.get(kind)[0]), strokeWidth: 1.5 })),
          ...[[true, 7], [false, 4]].map(([best, r]) => Plot.dot(items.filter((d) => d[front] === best),
            { x: cost, y: "change", r, fill: (d) => css(looks.get(d.kind)[0]), symbol: (d) => looks.get(d.kind)[1] })),
        ],
      },
    }));
  }

  if (data.kind === "run") {
    if (data.drop) drop();
    classes();
    calibration();
    const millions = (v) => `${number(v / 1e6)} M`;
    costs("plot-macs", data.layers.map((d) => ({ ...d, end: Math.max(d.dense_macs, d.macs) / 1e6 })),
      "dense_macs", "macs", 1e6, "million MACs", millions);
    ranks();
    errors();
    spectra();
    loss();
    if (data.progressive) progressive();
    recovery();
    const timed = data.layers.filter((d) => d.seconds !== null && d.dense_seconds !== null);
    costs("plot-latency", timed.map((d) => ({ ...d, end: Math.max(d.dense_seconds, d.seconds) * 1e3 })),
      "dense_seconds", "seconds", 1e-3, "milliseconds", (v) => `${number(v * 1e3)} ms`);
  } else if (data.points.length) {
    curve();
    if (data.files.length) {
      files("plot-files-time", "time", "by_time", "time");
      files("plot-files-size", "size", "by_bytes", "size");
    }
  }
})();
