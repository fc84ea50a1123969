"use strict";
// Draws the charts of an HTML report. Text from the report is only ever set as text, never as markup.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const tip = document.getElementById("tip");
  const hidden = new Map(); // chart id -> names of the series that are switched off

  const make = (parent, tag, attributes = {}, text = null) => {
    const element = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  };
  const node = (parent, tag, text = null) => {
    const element = document.createElement(tag);
    if (text !== null) element.textContent = text;
    parent.append(element);
    return element;
  };
  const show = (value) => {
    const size = Math.abs(value);
    if (size !== 0 && size < 0.001) return value.toExponential(2);
    return String(Number(value.toPrecision(size >= 1000 ? 6 : 4)));
  };
  const colour = (series, index) => `var(--${series.colour || "s" + (index % 6)})`;

  const ticks = (low, high, log) => {
    if (log) {
      const found = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const m of [1, 2, 5]) {
          const value = m * 10 ** e;
          if (value >= low && value <= high) found.push(value);
        }
      if (found.length > 2) return found;
    }
    const raw = (high - low) / 5;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw);
    const found = [];
    for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step)
      found.push(Number(value.toPrecision(12)));
    return found;
  };
  const scale = (low, high, from, to, log) => {
    const f = log ? Math.log : (v) => v;
    return (value) => from + ((f(value) - f(low)) / (f(high) - f(low) || 1)) * (to - from);
  };
  const range = (values, axis, log) => {
    let low = Math.min(...values), high = Math.max(...values);
    if (axis.min !== undefined) low = axis.min;
    if (axis.max !== undefined) high = axis.max;
    if (low === high) { low = log ? low / 1.5 : low - Math.abs(low || 1) * 0.1; high = log ? high * 1.5 : high + Math.abs(high || 1) * 0.1; }
    const pad = log ? 0 : (high - low) * 0.06;
    if (axis.min === undefined) low = log ? low / 1.15 : low - pad;
    if (axis.max === undefined) high = log ? high * 1.15 : high + pad;
    return [low, high];
  };

  const tell = (element, words, value) => {
    element.classList.add("mark");
    element.setAttribute("tabindex", "0");
    element.setAttribute("role", "img");
    element.setAttribute("aria-label", words.replace(/\n/g, ", "));
    element.dataset.value = value;
    const open = (x, y) => {
      tip.textContent = words;
      tip.hidden = false;
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.max(4, Math.min(x + 12, innerWidth - box.width - 4)) + "px";
      tip.style.top = Math.max(4, y - box.height - 10) + "px";
    };
    element.addEventListener("pointermove", (e) => open(e.clientX, e.clientY));
    element.addEventListener("pointerleave", () => { tip.hidden = true; });
    element.addEventListener("focus", () => {
      const box = element.getBoundingClientRect();
      open(box.x + box.width / 2, box.y);
    });
    element.addEventListener("blur", () => { tip.hidden = true; });
  };
  const words = (chart, series, point) => {
    const unit = chart.kind === "dots" ? "ms" : "";
    const lines = [series.name + (chart.kind === "lines" ? "" : series.name === point.x ? "" : `, ${point.x}`)];
    if (chart.kind === "lines") lines.push(`${chart.x.label}: ${show(point.x)}`);
    lines.push(`${chart.y.label || chart.x.label.split(";")[0]}: ${show(point.y)}${chart.kind === "dots" ? "" : unit}`);
    if (point.low !== undefined) lines.push(`95 %: ${show(point.low)} to ${show(point.high)}`);
    if (point.label) lines.push(point.label);
    return lines.join("\n");
  };

  const draw = (chart, box) => {
    const off = hidden.get(chart.id);
    const live = chart.series.map((s, i) => ({ ...s, index: i })).filter((s) => !off.has(s.name));
    const old = box.querySelector("svg");
    if (old) old.remove();
    const width = Math.max(280, box.clientWidth);
    const flat = chart.kind === "dots" || chart.kind === "intervals";
    const rows = flat ? [...new Set(chart.series.flatMap((s) => s.points.map((p) => p.x)))] : [];
    const left = flat ? Math.min(width * 0.42, 12 + 6.4 * Math.max(...rows.map((r) => r.length))) : 64;
    const names = chart.kind === "bars" ? [...new Set(chart.series.flatMap((s) => s.points.map((p) => p.x)))] : [];
    const longest = Math.max(0, ...names.map((n) => n.length));
    const slanted = chart.kind === "bars" && longest > 3 && names.length <= 16;
    const every = Math.ceil(names.length / Math.max(4, width / 60)); // longer rows are numbered; pointing at one names it
    const bottom = slanted ? Math.min(110, 26 + 4.4 * longest) + 14 : 42;
    const height = flat ? 34 * rows.length + 52 : 250 + bottom;
    const svg = make(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": chart.title });
    box.insertBefore(svg, box.querySelector("details"));
    const right = width - 10, top = 12, floor = height - bottom;
    const rules = chart.rules || [];
    const label = (text, x, y, more = {}) => make(svg, "text", { x, y, ...more }, text);
    label(chart.x.label, (left + right) / 2, height - 6, { "text-anchor": "middle" });
    if (!live.length) return;

    if (flat) {
      const values = live.flatMap((s) => s.points.flatMap((p) => [p.low ?? p.y, p.high ?? p.y]));
      const [low, high] = range([...values, ...rules.map((r) => r.value)], chart.kind === "dots" ? { min: 0 } : {}, false);
      const x = scale(low, high, left, right, false);
      for (const t of ticks(low, high, false)) {
        make(svg, "line", { class: "grid", x1: x(t), x2: x(t), y1: top, y2: height - 38 });
        label(show(t), x(t), height - 24, { "text-anchor": "middle" });
      }
      for (const rule of rules) {
        const line = make(svg, "line", { class: "rule", x1: x(rule.value), x2: x(rule.value), y1: top, y2: height - 38 });
        make(line, "title", {}, rule.name);
      }
      rows.forEach((row, i) => {
        const y = top + 34 * i + 17;
        const fits = Math.floor((left - 8) / 6.2);
        const text = label(row.length > fits ? row.slice(0, fits - 1) + "\u2026" : row, left - 8, y + 4, { "text-anchor": "end" });
        make(text, "title", {}, row);
        for (const series of live) {
          for (const point of series.points.filter((p) => p.x === row)) {
            const fill = point.quiet ? "var(--quiet)" : colour(series, series.index);
            if (point.low !== undefined)
              make(svg, "line", { x1: x(point.low), x2: x(point.high), y1: y, y2: y, stroke: fill, "stroke-width": 3 });
            tell(make(svg, "circle", { cx: x(point.y), cy: y, r: 5, fill, "fill-opacity": 0.8 }), words(chart, series, point), point.y);
          }
          if (series.median !== undefined && series.points[0].x === row)
            make(svg, "line", { x1: x(series.median), x2: x(series.median), y1: y - 12, y2: y + 12, stroke: colour(series, series.index), "stroke-width": 2.5 });
        }
      });
      return;
    }

    const log = Boolean(chart.y.log) && live.every((s) => s.points.every((p) => p.y > 0));
    const [low, high] = range([...live.flatMap((s) => s.points.map((p) => p.y)), ...rules.map((r) => r.value)], chart.y, log);
    const y = scale(low, high, floor, top, log);
    for (const t of ticks(low, high, log)) {
      make(svg, "line", { class: "grid", x1: left, x2: right, y1: y(t), y2: y(t) });
      label(show(t), left - 6, y(t) + 4, { "text-anchor": "end" });
    }
    make(svg, "text", { transform: `translate(12 ${(top + floor) / 2}) rotate(-90)`, "text-anchor": "middle" }, chart.y.label + (log ? " (log scale)" : ""));

    if (chart.kind === "bars") {
      const step = (right - left) / names.length;
      const bars = live.filter((s) => !s.marks);
      names.forEach((name, i) => {
        const middle = left + step * (i + 0.5);
        if (slanted) label(name, 0, 0, { transform: `translate(${middle + 3} ${floor + 12}) rotate(-40)`, "text-anchor": "end" });
        else if (i % every === 0) label(longest > 3 ? String(i) : name, middle, floor + 16, { "text-anchor": "middle" });
      });
      for (const series of live) {
        const fill = colour(series, series.index), at = bars.indexOf(series);
        for (const point of series.points) {
          const start = left + step * names.indexOf(point.x);
          const shape = series.marks
            ? make(svg, "line", { x1: start + step * 0.1, x2: start + step * 0.9, y1: y(point.y), y2: y(point.y), stroke: fill, "stroke-width": 3 })
            : make(svg, "rect", {
                x: start + step * (0.1 + (0.8 / bars.length) * at), width: (step * 0.8) / bars.length,
                y: Math.min(y(point.y), floor - 1), height: Math.max(1, floor - y(point.y)), fill,
              });
          tell(shape, words(chart, series, point), point.y);
        }
      }
    } else {
      const [first, last] = range(live.flatMap((s) => s.points.map((p) => p.x)), {}, false);
      const x = scale(first, last, left, right, false);
      for (const t of ticks(first, last, false)) label(show(t), x(t), floor + 16, { "text-anchor": "middle" });
      for (const series of live) {
        const stroke = colour(series, series.index);
        if (!series.marks) {
          let path = "";
          series.points.forEach((p, i) => {
            path += i === 0 ? `M${x(p.x)} ${y(p.y)}` : series.step ? `H${x(p.x)}V${y(p.y)}` : `L${x(p.x)} ${y(p.y)}`;
          });
          make(svg, "path", { d: path, fill: "none", stroke, "stroke-width": 1.8 });
        }
        for (const point of series.points) {
          const mine = point.label === "this model";
          const dot = make(svg, "circle", { cx: x(point.x), cy: y(point.y), r: mine ? 6.5 : series.step ? 2.5 : 4, fill: stroke });
          tell(dot, words(chart, series, point), point.y);
        }
      }
    }
    for (const rule of rules) {
      make(svg, "line", { class: "rule", x1: left, x2: right, y1: y(rule.value), y2: y(rule.value) });
      label(`${rule.name}: ${show(rule.value)}`, right, y(rule.value) - 5, { "text-anchor": "end", class: "over" });
    }
  };

  const values = (chart, box) => {
    const details = node(box, "details");
    node(details, "summary", "values");
    const wide = node(details, "div");
    wide.className = "wide";
    const table = node(wide, "table"), head = node(node(table, "thead"), "tr"), body = node(table, "tbody");
    for (const name of ["series", "x", "y", "low", "high", "what"]) node(head, "th", name);
    for (const series of chart.series)
      for (const p of series.points) {
        const row = node(body, "tr");
        for (const cell of [series.name, p.x, p.y, p.low ?? "", p.high ?? "", p.label ?? ""]) node(row, "td", String(cell));
      }
  };

  const legend = (chart, box) => {
    const bar = node(box, "div");
    bar.className = "legend";
    chart.series.forEach((series, index) => {
      const button = node(bar, "button");
      button.type = "button";
      button.setAttribute("aria-pressed", "true");
      node(button, "i").style.background = colour(series, index);
      button.append(series.name);
      button.addEventListener("click", () => {
        const off = hidden.get(chart.id);
        off.has(series.name) ? off.delete(series.name) : off.add(series.name);
        button.setAttribute("aria-pressed", String(!off.has(series.name)));
        draw(chart, box);
      });
    });
  };

  for (const chart of charts) {
    const box = document.getElementById(`chart-${chart.id}`);
    if (!box) continue;
    hidden.set(chart.id, new Set());
    if (chart.series.length > 1) legend(chart, box);
    values(chart, box);
    draw(chart, box);
    let width = box.clientWidth;
    new ResizeObserver(() => {
      if (box.clientWidth !== width) { width = box.clientWidth; draw(chart, box); }
    }).observe(box);
  }

  // A long table can be sorted by any column; numbers count as numbers, whatever unit stands behind them.
  const number = (text) => {
    const found = text.replace(/,/g, "").match(/-?\d+(\.\d+)?(e[+-]?\d+)?/i);
    return found ? Number(found[0]) : null;
  };
  for (const table of document.querySelectorAll("main > .wide > table")) {
    const body = table.tBodies[0];
    if (!body || body.rows.length < 6 || !table.tHead.rows[0].cells[1].textContent.trim() || table.tHead.rows[0].cells[0].textContent.trim() !== "layer") continue;
    [...table.tHead.rows[0].cells].forEach((cell, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = cell.textContent;
      cell.replaceChildren(button);
      button.addEventListener("click", () => {
        const up = cell.getAttribute("aria-sort") !== "ascending";
        for (const other of cell.parentNode.cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", up ? "ascending" : "descending");
        const key = (row) => row.cells[column].textContent;
        const rows = [...body.rows].sort((a, b) => {
          const m = number(key(a)), n = number(key(b));
          return (m !== null && n !== null ? m - n : key(a).localeCompare(key(b))) * (up ? 1 : -1);
        });
        body.append(...rows);
      });
    });
  }

  const theme = document.getElementById("theme");
  const dark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const name = () => { theme.textContent = dark() ? "light" : "dark"; };
  theme.hidden = false;
  name();
  theme.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    name();
  });
  document.documentElement.dataset.drawn = String(document.querySelectorAll(".chart svg").length);
})();
