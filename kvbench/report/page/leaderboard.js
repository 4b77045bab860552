"use strict";
(() => {
  // Data are strings of headers and of models: they are only ever put on the page as text, by `make` and `textContent`.
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);

  // ---- elements -------------------------------------------------------------------------------------------------

  function fill(element, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (value === true) element.setAttribute(name, "");
      else if (value !== false && value != null) element.setAttribute(name, value);
    }
    element.append(...children.flat(Infinity).filter((child) => child != null));
    return element;
  }
  const make = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
  const draw = (tag, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  // ---- numbers as text ------------------------------------------------------------------------------------------

  const known = (x) => x !== null && x !== undefined;
  function number(x, sign = false) {
    if (!known(x)) return "";
    const size = Math.abs(x);
    const text = size === 0 ? "0" : size < 1e-4 ? size.toExponential(1) : size < 0.001 ? size.toPrecision(2) : size.toFixed(3);
    return (x < 0 ? "\u2212" : sign && x > 0 ? "+" : "") + text;
  }
  const interval = (low, high, sign) => (known(low) ? `[${number(low, sign)}, ${number(high, sign)}]` : "");
  const percent = (x) => (known(x) ? `${(100 * x).toFixed(x < 0.1 ? 2 : 1)} %` : "");
  const mebi = (x) => (known(x) ? (x / 2 ** 20).toFixed(x < 100 * 2 ** 20 ? 2 : 0) : "");
  const count = (x) => (known(x) ? Math.round(x).toLocaleString("en") : "");
  const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;
  const clip = (text, most) => (text.length <= most ? text : text.slice(0, most - 1) + "…");

  // ---- cells ----------------------------------------------------------------------------------------------------

  const cells = data.cells;
  for (const cell of cells) {
    for (const [name, values] of Object.entries(cell.metrics))
      cell.metrics[name] = Object.fromEntries(data.fields.map((field, i) => [field, values[i]]));
    cell.read = known(cell.bytes_read) && cell.bytes_full ? cell.bytes_read / cell.bytes_full : null;
    cell.generate = cell.generate ? "yes" : "no";
    cell.seed = String(cell.seed);
  }
  const metricOf = Object.fromEntries(data.metrics.map((metric) => [metric.name, metric]));
  const value = (cell, field = "mean") => cell.metrics[state.metric]?.[field] ?? null;
  const FAMILIES = ["reference", "scorer", "allocator", "codec", "router", "merging", "pattern", "retrieval"];
  const family = (cell) => (FAMILIES.includes(cell.family) ? cell.family : "other");
  // "0.1", "128tok", "1048576B": by what stands behind the number, then by the number.
  const budgetOrder = (text) => [text.replace(/^[\d.e+-]+/, ""), parseFloat(text)];

  function compare(a, b) {
    if (Array.isArray(a)) return compare(a[0], b[0]) || (a.length > 1 ? compare(a.slice(1), b.slice(1)) : 0);
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });
  }
  const values = (name) =>
    [...new Set(cells.map((cell) => cell[name]))].sort((a, b) =>
      name === "budget" ? compare(budgetOrder(a), budgetOrder(b)) : compare(a, b));

  const many = (name) => values(name).length > 1;

  // A cell is compared with the full cache of the same setting; numbers of different settings are not comparable.
  const SETTING = { task: "Task", model: "Model", protocol: "Protocol", seed: "Seed", generate: "Answers" };
  const settingKey = (cell, names = Object.keys(SETTING)) => JSON.stringify(names.map((name) => cell[name]));
  // What tells settings apart: without a seed that follows from the task nothing is lost.
  const settings = (names) => new Set(cells.map((cell) => settingKey(cell, names))).size;
  const varying = Object.keys(SETTING).filter((name) => settings(Object.keys(SETTING)) > settings(Object.keys(SETTING).filter((one) => one !== name)));
  const settingText = (cell, names = varying) =>
    names.map((name) => (name === "seed" ? `seed ${cell.seed}` : name === "generate" ? (cell.generate === "yes" ? "answers" : "no answers") : cell[name])).join(" · ");

  // ---- state, kept in the address's fragment --------------------------------------------------------------------

  const INITIAL = { metric: data.metrics[0]?.name ?? "score", x: "share", sort: "", q: "", from: "", to: "", cell: "" };
  const SELECTS = { model: "Model", task: "Task", protocol: "Protocol", family: "Family", training: "Training", budget: "Budget", seed: "Seed", generate: "Answers" };
  for (const name of Object.keys(SELECTS)) INITIAL[name] = "";
  const state = { ...INITIAL };

  function readState() {
    const given = new URLSearchParams(location.hash.slice(1));
    for (const name of Object.keys(INITIAL)) state[name] = given.get(name) ?? INITIAL[name];
    if (!metricOf[state.metric]) state.metric = INITIAL.metric;
    if (!["share", "read"].includes(state.x)) state.x = "share";
    for (const name of Object.keys(SELECTS)) if (!values(name).includes(state[name])) state[name] = "";
  }

  function writeState() {
    const changed = Object.entries(state).filter(([name, value]) => value !== INITIAL[name]);
    history.replaceState(null, "", "#" + new URLSearchParams(changed));
  }

  // ---- filters --------------------------------------------------------------------------------------------------

  const field = (label, input, wide) => make("label", { class: wide ? "wide" : null }, make("span", { class: "name" }, label), input);

  function buildFilters() {
    const choices = data.metrics.map(({ name, label }) =>
      make("label", {}, make("input", { type: "radio", name: "metric", value: name }), make("span", {}, label)));
    const selects = Object.entries(SELECTS).filter(([name]) => (name in SETTING ? varying.includes(name) : many(name))).map(([name, label]) =>
      field(label, make("select", { name }, make("option", { value: "" }, "all"), values(name).map((one) => make("option", { value: one }, one)))));
    const range = make("div", { class: "field", role: "group", "aria-label": "Share of the full cache's bytes that is held, in per cent" },
      make("span", { class: "name", "aria-hidden": "true" }, "Held, % of full"),
      make("span", {},
        make("input", { type: "number", name: "from", min: 0, step: "any", placeholder: "from", "aria-label": "from" }), " – ",
        make("input", { type: "number", name: "to", min: 0, step: "any", placeholder: "to", "aria-label": "to" })));
    at("filters").append(
      make("fieldset", { class: "wide" }, make("legend", {}, "Quality"), make("div", { class: "choice" }, choices)),
      ...selects, range,
      field("Method", make("input", { type: "search", name: "q", placeholder: "any text of its name" })),
      make("button", { type: "button", id: "reset", onclick: reset }, "Reset"));
    at("filters").addEventListener("input", ({ target }) => { state[target.name] = target.value; update(); });
    at("filters").addEventListener("submit", (event) => event.preventDefault());
    at("x").addEventListener("input", () => { state.x = at("x").value; update(); });
  }

  function showState() {
    for (const input of at("filters").elements)
      if (input.type === "radio") input.checked = input.value === state[input.name];
      else if (input.name) input.value = state[input.name];
    at("x").value = state.x;
  }

  function reset() {
    Object.assign(state, INITIAL);
    showState();
    update();
  }

  function chosen() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const bound = (text) => (text === "" || !Number.isFinite(Number(text)) ? null : Number(text) / 100);
    const [from, to] = [bound(state.from), bound(state.to)];
    return cells.filter((cell) =>
      Object.keys(SELECTS).every((name) => !state[name] || cell[name] === state[name]) &&
      words.every((word) => cell.method.toLowerCase().includes(word)) &&
      (from === null || (known(cell.share) && cell.share >= from)) &&
      (to === null || (known(cell.share) && cell.share <= to)));
  }

  // ---- glyphs: a family is a colour and a shape -----------------------------------------------------------------

  const SHAPES = {
    reference: "M-4,-4L4,4M-4,4L4,-4", scorer: "M-3.6,0a3.6,3.6 0 1,0 7.2,0a3.6,3.6 0 1,0 -7.2,0Z", allocator: "M0,-4.8L4.8,0L0,4.8L-4.8,0Z",
    codec: "M-3.4,-3.4H3.4V3.4H-3.4Z", router: "M0,-4.6L4.4,3.2H-4.4Z", merging: "M0,4.6L4.4,-3.2H-4.4Z", pattern: "M-4.5,0H4.5M0,-4.5V4.5",
    retrieval: "M0,-5L1.3,-1.6L4.8,-1.5L2,0.7L3,4.1L0,2.1L-3,4.1L-2,0.7L-4.8,-1.5L-1.3,-1.6Z", other: "M-4,0H4",
  };
  const glyph = (name) =>
    draw("svg", { class: `glyph ${name}`, width: 12, height: 12, viewBox: "-6 -6 12 12", "aria-hidden": "true" }, draw("path", { d: SHAPES[name], "stroke-width": 1.5 }));

  // ---- plot -----------------------------------------------------------------------------------------------------

  const PANELS = 12;

  function renderPlot(shown) {
    const plotted = shown.filter((cell) => known(value(cell)) && cell[state.x] > 0);
    const groups = [...Map.groupBy(plotted, (cell) => settingKey(cell)).values()].sort((a, b) => b.length - a.length || compare(settingText(a[0]), settingText(b[0])));
    const held = groups.slice(0, PANELS).sort((a, b) => compare(settingText(a[0]), settingText(b[0])));
    at("panels").className = held.length === 1 ? "single" : "";
    const figures = held.map((group) => make("figure", {}, make("figcaption", { title: settingText(group[0]) }, settingText(group[0]))));
    at("panels").replaceChildren(...figures);
    figures.forEach((figure, i) => figure.append(panel(held[i], figure.clientWidth, held.length === 1)));
    const notes = [];
    if (groups.length > PANELS) notes.push(`${plural(groups.length - PANELS, "more setting")} not drawn: filter to see them.`);
    const left = shown.length - plotted.length;
    if (left) notes.push(`${plural(left, "cell")} without this metric${state.x === "read" ? " or bytes" : ""} not drawn.`);
    if (!plotted.length) notes.push("Nothing to draw: no cell that is shown has this metric.");
    else notes.push("Step line: what no cheaper cell beats. Dashed: the full cache. Hollow: not finished.");
    at("plot-note").textContent = notes.join(" ");
    const families = [...FAMILIES, "other"].filter((name) => plotted.some((cell) => family(cell) === name));
    at("legend").replaceChildren(...families.map((name) => make("li", {}, glyph(name), name)));
  }

  function ticksLinear(low, high, most) {
    const raw = (high - low) / most;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((x) => x * unit).find((x) => x >= raw);
    const found = [];
    for (let x = Math.ceil(low / step - 1e-9); x * step <= high + step * 1e-9; x++) found.push(x * step);
    return [found, Math.max(0, -Math.floor(Math.log10(step) + 1e-9))];
  }

  function ticksLog(low, high, most) {
    for (const steps of [[1, 2, 5], [1, 3], [1]]) {
      const found = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const step of steps) if (step * 10 ** power >= low && step * 10 ** power <= high) found.push(step * 10 ** power);
      if (found.length <= most || steps.length === 1) return found;
    }
  }

  function panel(group, width, large) {
    const metric = metricOf[state.metric];
    const higher = metric.better === "higher";
    const height = large ? Math.min(440, Math.max(260, width * 0.5)) : Math.max(230, width * 0.58);
    const [left, right, top, bottom] = [52, 14, 16, 40];
    const full = group.find((cell) => cell.method === "full") ?? cells[group[0].full];
    const fullAt = full ? value(full) : null;
    const xs = group.map((cell) => cell[state.x]);
    const ys = group.map((cell) => value(cell)).concat(known(fullAt) ? [fullAt] : []);
    let [x0, x1] = [Math.min(...xs) / 1.2, Math.max(1, ...xs) * 1.2];
    // A distance to the full cache spans decades; one of 0 then lies on the axis.
    const log = state.metric === "kl_full" && Math.max(...ys) > 0;
    const scale = log ? (y) => Math.log(Math.max(y, floor)) : (y) => y;
    const floor = Math.min(...ys.filter((y) => y > 0)) / 1.5;
    let [y0, y1] = [Math.min(...ys.map(scale)), Math.max(...ys.map(scale))];
    const room = (y1 - y0 || Math.abs(y1) || 1) * 0.06;
    [y0, y1] = [log ? y0 : y0 - room, y1 + room];
    const X = (x) => left + ((width - left - right) * Math.log(x / x0)) / Math.log(x1 / x0);
    const Y = (y) => height - bottom - ((height - top - bottom) * (scale(y) - y0)) / (y1 - y0);
    const inside = (y) => Math.max(top, Math.min(height - bottom, y));

    const points = group.map((cell) => ({ cell, x: X(cell[state.x]), y: Y(value(cell)) }))
      .sort((a, b) => a.x - b.x || a.y - b.y);
    const svg = draw("svg", {
      viewBox: `0 0 ${width} ${height}`, role: "group",
      "aria-label": `${settingText(group[0], Object.keys(SETTING))}: ${metric.label} against bytes, ${plural(points.length, "cell")}. Arrow keys go from cell to cell, Enter opens one.`,
    });
    const back = draw("g", { "aria-hidden": "true" });
    const [yTicks, digits] = log ? [ticksLog(Math.exp(y0), Math.exp(y1), height / 40), 0] : ticksLinear(y0, y1, height / 42);
    for (const y of yTicks)
      back.append(draw("path", { class: "grid", d: `M${left},${Y(y)}H${width - right}` }),
        draw("text", { x: left - 6, y: Y(y) + 4, "text-anchor": "end" }, log ? String(Number(y.toPrecision(3))) : (y < -1e-12 ? "\u2212" : "") + Math.abs(y).toFixed(digits)));
    for (const x of ticksLog(x0, x1, (width - left) / 48))
      back.append(draw("path", { class: "axis", d: `M${X(x)},${height - bottom}v4` }),
        draw("text", { x: X(x), y: height - bottom + 16, "text-anchor": "middle" }, `${Number((100 * x).toPrecision(3))} %`));
    const says = { share: "Bytes held", read: "Bytes read per step" }[state.x];
    back.append(draw("path", { class: "axis", d: `M${left},${top}V${height - bottom}H${width - right}` }),
      draw("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, `${says}, share of the full cache (log)`),
      draw("text", { transform: `translate(11,${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" },
        `${metric.label}${metric.unit ? `, ${metric.unit}` : ""} (${log ? "log, " : ""}${metric.better} is better)`));
    if (known(fullAt) && !(log && fullAt <= 0))
      back.append(draw("path", { class: "fullline", d: `M${left},${Y(fullAt)}H${width - right}` }),
        draw("text", { class: "fulltext", x: width - right, y: Y(fullAt) + (higher ? 15 : -7), "text-anchor": "end" }, "full cache"));

    // The frontier: what no cell of fewer bytes, or as many, beats.
    const front = [];
    for (const point of [...points].sort((a, b) => a.x - b.x || (higher ? a.y - b.y : b.y - a.y))) {
      const before = front.at(-1);
      if (point.cell.status === "done" && (!before || (higher ? point.y < before.y - 1e-9 : point.y > before.y + 1e-9))) front.push(point);
    }
    back.append(draw("path", { class: "front", d: front.map((p, i) => (i ? `H${p.x}V${p.y}` : `M${p.x},${p.y}`)).join("") + (front.length ? `H${width - right}` : "") }));
    const line = draw("path", { class: "method" });
    back.append(line);
    svg.append(back);

    for (const point of points) {
      const { low, high } = point.cell.metrics[state.metric];
      point.whisker = draw("path", { class: `whisker ${family(point.cell)}`, stroke: "currentColor", opacity: front.includes(point) ? 0.6 : 0, d: known(low) ? `M${point.x},${inside(Y(low))}V${inside(Y(high))}` : "M0,0" });
      back.append(point.whisker);
    }
    const marks = points.map((point) => {
      const { cell } = point;
      point.node = draw("g", {
        class: "point glyph " + family(cell) + (cell.status === "done" ? "" : " hollow"), role: "button", tabindex: -1,
        transform: `translate(${point.x},${point.y})`, "aria-label": spoken(cell), onfocus: () => light(point), onblur: dark,
      }, draw("path", { d: SHAPES[family(cell)] }));
      return point.node;
    });
    marks[0]?.setAttribute("tabindex", 0);
    svg.append(...marks, labels(front, width, higher));

    function light(point) {
      const same = points.filter((one) => one.cell.method === point.cell.method);
      for (const one of points) for (const node of [one.node, one.whisker]) node.classList.toggle("same", same.includes(one));
      for (const one of same) one.whisker.setAttribute("opacity", 0.7);
      line.setAttribute("class", `method ${family(point.cell)}`);
      line.setAttribute("stroke", "currentColor");
      line.setAttribute("d", same.map((one, i) => `${i ? "L" : "M"}${one.x},${one.y}`).join(""));
      svg.classList.add("lit");
      const box = svg.getBoundingClientRect();
      tell(point.cell, box.left + (point.x * box.width) / width, box.top + (point.y * box.height) / height);
    }
    function dark() {
      svg.classList.remove("lit");
      for (const one of points) one.whisker.setAttribute("opacity", front.includes(one) ? 0.6 : 0);
      line.setAttribute("d", "");
      at("tip").hidden = true;
    }
    function nearest(event) {
      const box = svg.getBoundingClientRect();
      const [x, y] = [((event.clientX - box.left) * width) / box.width, ((event.clientY - box.top) * height) / box.height];
      const away = (point) => Math.hypot(point.x - x, point.y - y);
      const best = points.reduce((a, b) => (away(b) < away(a) ? b : a));
      return away(best) < 24 ? best : null;
    }
    svg.addEventListener("pointermove", (event) => { const point = nearest(event); point ? light(point) : dark(); });
    svg.addEventListener("pointerleave", dark);
    svg.addEventListener("click", (event) => { const point = nearest(event); if (point) open(point.cell, point.node); });
    svg.addEventListener("keydown", (event) => {
      const i = marks.indexOf(document.activeElement);
      if (i < 0) return;
      const to = { ArrowRight: i + 1, ArrowDown: i + 1, ArrowLeft: i - 1, ArrowUp: i - 1, Home: 0, End: marks.length - 1 }[event.key];
      if (event.key === "Enter" || event.key === " ") open(points[i].cell, marks[i]);
      else if (to === undefined) return;
      else if (marks[to]) {
        marks[i].setAttribute("tabindex", -1);
        marks[to].setAttribute("tabindex", 0);
        marks[to].focus();
      }
      event.preventDefault();
    });
    return svg;
  }

  // Names beside the frontier's points, where there is room.
  function labels(front, width, higher) {
    const taken = [];
    const named = new Set(["full"]);
    const found = draw("g", { "aria-hidden": "true" });
    for (const point of front) {
      const text = clip(point.cell.method, 26);
      const size = text.length * 6;
      const start = point.x + size + 10 < width;
      const [x, y] = [point.x + (start ? 7 : -7), point.y + (higher ? -7 : 14)];
      const box = [start ? x : x - size, y - 10, start ? x + size : x, y + 2];
      if (named.has(point.cell.method) || taken.some((one) => box[0] < one[2] && one[0] < box[2] && box[1] < one[3] && one[1] < box[3])) continue;
      taken.push(box);
      named.add(point.cell.method);
      found.append(draw("text", { class: "name", x, y, "text-anchor": start ? "start" : "end" }, text));
    }
    return found;
  }

  function spoken(cell) {
    const metric = cell.metrics[state.metric];
    return `${cell.method}, budget ${cell.budget}: ${metricOf[state.metric].label} ${number(metric.mean)} ${interval(metric.low, metric.high)}, ${percent(cell[state.x])} of the full cache's bytes`;
  }

  function tell(cell, x, y) {
    const metric = cell.metrics[state.metric];
    const tip = at("tip");
    tip.replaceChildren(
      make("p", {}, cell.method),
      make("p", { class: "soft" }, `budget ${cell.budget} · ${settingText(cell, ["task", "protocol"])}`),
      make("p", {}, `${metricOf[state.metric].label} ${number(metric.mean)} `, make("span", { class: "interval" }, `${interval(metric.low, metric.high)} n ${metric.n}`)),
      known(metric.vs_full) && cell.method !== "full" && !distance() ? make("p", {}, `Δ full ${number(metric.vs_full, true)} `, make("span", { class: "interval" }, interval(metric.vs_full_low, metric.vs_full_high, true))) : "",
      make("p", {}, `${mebi(cell.bytes_held)} MiB held, ${percent(cell.share)} of full`));
    tip.hidden = false;
    const room = 12;
    tip.style.left = `${Math.max(4, x + room + tip.offsetWidth > innerWidth ? x - room - tip.offsetWidth : x + room)}px`;
    tip.style.top = `${Math.max(4, Math.min(y + room, innerHeight - tip.offsetHeight - 4))}px`;
  }

  // ---- table ----------------------------------------------------------------------------------------------------

  // `of`: what a column sorts by. `best`: first when its header is pressed first; text goes up, else ("high") down.
  const metricSign = () => (metricOf[state.metric]?.better === "higher" ? "high" : "low");
  const text = (name, label, extra = {}) => ({ name, label, of: (cell) => cell[name], show: (cell) => [make("div", { class: "text", title: cell[name] }, cell[name] ?? "")], ...extra });
  const numeric = (name, label, form, best = "low", of = (cell) => cell[name]) => ({ name, label, of, show: (cell) => [form(of(cell))], number: true, best: () => best });
  // A distance to the full cache is its own difference.
  const distance = () => ["kl_full", "agree_full"].includes(state.metric);
  const difference = (name, label) => ({
    name, label, number: true, off: () => name === "vs_full" && distance(), best: metricSign, of: (cell) => (cell.method === { vs_full: "full", vs_baseline: data.baseline }[name] ? null : value(cell, name)),
    show: (cell) => {
      const { [name]: mean, [`${name}_low`]: low, [`${name}_high`]: high } = cell.metrics[state.metric] ?? {};
      if (!known(mean) || cell.method === { vs_full: "full", vs_baseline: data.baseline }[name]) return [];
      const holds = !known(low) || (low <= 0 && high >= 0);
      return [make("span", { class: holds ? "faint" : null }, number(mean, true)), " ", make("span", { class: "interval" }, interval(low, high, true))];
    },
  });
  const COLUMNS = [
    {
      ...text("method", "Method"),
      show: (cell) => [glyph(family(cell)), " ", make("button", { type: "button", class: "link", title: cell.method, "aria-haspopup": "dialog" }, cell.method), make("span", { class: "under" }, settingText(cell))],
    },
    text("budget", "Budget", { show: (cell) => [cell.budget], of: (cell) => budgetOrder(cell.budget), number: true }),
    ...Object.entries(SETTING).filter(([name]) => varying.includes(name)).map(([name, label]) => text(name, label, { narrow: true })),
    {
      name: "value", label: "Value", number: true, best: metricSign, of: (cell) => value(cell),
      show: (cell) => [number(value(cell)), " ", make("span", { class: "interval" }, interval(value(cell, "low"), value(cell, "high")))],
    },
    difference("vs_full", "Δ full"),
    { name: "forest", label: "", show: forest, narrow: true, off: distance },
    ...(data.baseline === "full" ? [] : [difference("vs_baseline", `Δ ${clip(data.baseline, 20)}`)]),
    ...(data.baseline === "full" ? [] : [numeric("p_adjusted", "p adjusted", number, "low", (cell) => value(cell, "p_adjusted"))]),
    numeric("share", "Share", percent),
    numeric("bytes_held", "Held, MiB", mebi),
    numeric("bytes_read", "Read, MiB", mebi),
    numeric("n", "n", count, "high", (cell) => value(cell, "n")),
    { name: "marks", label: "Marks", of: (cell) => told(cell) || null, show: (cell) => [make("div", { title: told(cell) }, told(cell))], marks: true },
    text("family", "Family", { narrow: true }),
    text("training", "Training", { narrow: true }),
    text("trust", "Trust", { narrow: true }),
  ].filter(({ name }) => !["family", "training", "trust", "bytes_read"].includes(name) || many(name));
  function told(cell, metrics = [state.metric]) {
    const marks = metrics.flatMap((name) => (cell.metrics[name]?.marks || "").split("; ")).filter(Boolean);
    const ended = cell.status === "done" ? [] : [cell.reason ? `${cell.status}: ${cell.reason}` : cell.status];
    return [...new Set([...ended, ...marks])].join("; ");
  }

  let reach = [-1, 1]; // of most of the differences that are shown
  function forest(cell) {
    const { vs_full: mean, vs_full_low: low, vs_full_high: high } = cell.metrics[state.metric] ?? {};
    if (!known(mean) || cell.method === "full") return [];
    const X = (x) => 3 + (74 * (Math.max(reach[0], Math.min(reach[1], x)) - reach[0])) / (reach[1] - reach[0]);
    return [draw("svg", { class: `forest ${family(cell)}`, width: 80, height: 12, "aria-hidden": "true" },
      draw("line", { class: "zero", x1: X(0), x2: X(0), y1: 0, y2: 12 }),
      known(low) ? draw("line", { x1: X(low), x2: X(high), y1: 6, y2: 6, "stroke-width": 1.5 }) : "",
      draw("circle", { cx: X(mean), cy: 6, r: 2.6, fill: "currentColor" }))];
  }

  function sorted(shown) {
    const [name, way] = state.sort.split(":");
    const column = COLUMNS.find((one) => one.name === name && one.of);
    // Before anything is pressed: settings together, the best first.
    const usual = (cell) => [known(cell.metrics[state.metric]) ? 0 : 1, settingText(cell), known(value(cell)) ? 0 : 1, (metricSign() === "high" ? -1 : 1) * (value(cell) ?? 0), cell.method, ...budgetOrder(cell.budget)];
    const of = column ? column.of : () => 0;
    const keys = new Map(shown.map((cell) => [cell, [of(cell), usual(cell)]]));
    return [...shown].sort((a, b) => {
      const [[x, xs], [y, ys]] = [keys.get(a), keys.get(b)];
      if (known(x) !== known(y)) return known(x) ? -1 : 1; // what is missing comes last either way
      return (known(x) ? (way === "down" ? -1 : 1) * compare(x, y) : 0) || compare(xs, ys);
    });
  }

  function press(column) {
    const [name, way] = state.sort.split(":");
    const first = column.best?.() === "high" ? "down" : "up";
    state.sort = `${column.name}:${name === column.name ? (way === "up" ? "down" : "up") : first}`;
    writeState();
    renderHead();
    renderTable(chosen());
  }

  function buildHead() {
    at("head").replaceChildren(...COLUMNS.map((column) => {
      const head = make("th", { scope: "col", class: [column.number ? "number" : "", column.narrow ? "narrowed" : ""].join(" ").trim() || null });
      if (column.of) head.append(make("button", { type: "button", onclick: () => press(column) }, column.label, make("span", { "aria-hidden": "true" })));
      else head.append(make("span", { class: "hidden" }, "Δ full as a picture"));
      return head;
    }));
  }

  function renderHead() {
    const [name, way] = state.sort.split(":");
    COLUMNS.forEach((column, i) => {
      const head = at("head").children[i];
      head.hidden = column.off?.() ?? false;
      if (!column.of) return;
      const on = column.name === name;
      if (column.name === "value") head.querySelector("button").firstChild.textContent = metricOf[state.metric]?.label ?? "Value";
      head.querySelector("span").textContent = on ? (way === "up" ? "▲" : "▼") : "";
      if (on) head.setAttribute("aria-sort", way === "up" ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    });
  }

  const ROWS = 250; // so many at first: a thousand rows take a while to lay out
  let order = []; // the cells of the table, as they stand
  function renderTable(shown, all = false) {
    const [lows, highs] = ["vs_full_low", "vs_full_high"].map((end) => shown.map((cell) => value(cell, end) ?? value(cell, "vs_full")).filter(known).sort((a, b) => a - b));
    const most = (sorted, share) => sorted[Math.round(share * (sorted.length - 1))] ?? 0;
    reach = [Math.min(0, most(lows, 0.1)), Math.max(0, most(highs, 0.9))];
    if (reach[0] === reach[1]) reach = [-1, 1];
    order = sorted(shown);
    at("body").replaceChildren(...order.slice(0, all ? order.length : ROWS).map((cell) => {
      const row = make("tr", {}, COLUMNS.map((column, i) => {
        if (column.off?.()) return make("td", { hidden: true });
        const kind = [column.number ? "number" : "", column.narrow ? "narrowed" : "", column.marks ? "marks" : ""].join(" ").trim() || null;
        return make(i ? "td" : "th", { class: kind, scope: i ? null : "row" }, column.show(cell));
      }));
      row.cell = cell;
      return row;
    }));
    at("rest").hidden = all || order.length <= ROWS;
    at("rest").textContent = `Show all ${plural(order.length, "row")}`;
    at("count").textContent = shown.length === cells.length ? plural(cells.length, "cell") : `${shown.length} of ${plural(cells.length, "cell")}`;
  }

  at("rest").addEventListener("click", () => {
    renderTable(chosen(), true);
    at("body").children[ROWS].querySelector("button").focus();
  });
  at("body").addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (row && getSelection().isCollapsed) open(row.cell, row.querySelector("button"));
  });
  at("body").addEventListener("keydown", (event) => {
    const row = event.target.closest("tr");
    const next = { ArrowDown: row?.nextElementSibling, ArrowUp: row?.previousElementSibling }[event.key];
    if (!next) return;
    next.querySelector("button").focus();
    event.preventDefault();
  });

  // ---- a cell's details -----------------------------------------------------------------------------------------

  let opener = null;

  const pairs = (entries) => make("dl", {}, entries.filter(([, shown]) => known(shown) && shown !== "").map(([name, shown]) => [make("dt", {}, name), make("dd", {}, shown)]));
  const flat = (value, name = "") =>
    value !== null && typeof value === "object" && !Array.isArray(value)
      ? Object.entries(value).flatMap(([key, inner]) => flat(inner, name ? `${name}.${key}` : key))
      : [[name, value === null ? "" : typeof value === "object" ? JSON.stringify(value) : String(value)]];
  const part = (title, ...children) => [make("h3", {}, title), ...children];

  function open(cell, from = null) {
    opener = from ?? opener;
    state.cell = cell.cell;
    writeState();
    at("tip").hidden = true;
    const i = order.indexOf(cell);
    const every = told(cell, Object.keys(cell.metrics));
    const step = (to, label, sign) => make("button", { type: "button", disabled: !order[to] || i < 0, "aria-label": label, title: label, onclick: () => open(order[to]) }, sign);
    at("details").replaceChildren(
      make("div", { class: "top" },
        make("div", {},
          make("h2", { id: "details-title", tabindex: -1, autofocus: true }, `${cell.method} at ${cell.budget}`),
          make("p", { class: "soft" }, [cell.task, cell.model, cell.protocol, `seed ${cell.seed}`, cell.generate === "yes" ? null : "no answers"].filter(Boolean).join(" · "))),
        make("div", { role: "group", "aria-label": "Other cells", class: "buttons" }, step(i - 1, "Previous cell", "↑"), " ", step(i + 1, "Next cell", "↓"), " ",
          make("button", { type: "button", onclick: () => at("details").close() }, "Close"))),
      make("div", { class: "inside" },
        every ? make("p", { class: "warn" }, every) : "",
        quality(cell), bytes(cell), answers(cell), seconds(cell), provenance(cell), again(cell)));
    if (!at("details").open) at("details").showModal();
    at("details-title").focus();
    at("details").scrollTop = 0;
  }
  at("details").addEventListener("close", () => {
    state.cell = "";
    writeState();
    // The browser has given the focus back already, where it could; by now a key may have moved it on.
    if (document.activeElement === document.body) (opener?.isConnected ? opener : at("cells")).focus();
    opener = null;
  });
  at("details").addEventListener("click", (event) => {
    if (event.target === at("details") && event.clientX < at("details").getBoundingClientRect().left) at("details").close();
  });

  function quality(cell) {
    const measured = data.metrics.filter(({ name }) => known(cell.metrics[name]?.mean));
    if (!measured.length) return [];
    const same = (what) => cell.method === what;
    const p = (m) => (known(m.p) ? `${number(m.p)} (${m.test}), ${number(m.p_adjusted)} (${m.adjust})` : "");
    const rows = [
      ["mean", (m) => number(m.mean)],
      ["95 % interval", (m) => `${interval(m.low, m.high)} ${m.interval}`],
      ["median", (m) => number(m.median)],
      ["examples, clusters", (m) => `${count(m.n)}, ${count(m.clusters)}`],
      ["Δ full", (m) => (same("full") || !known(m.vs_full) ? "" : `${number(m.vs_full, true)} ${interval(m.vs_full_low, m.vs_full_high, true)}`)],
      ...(data.baseline === "full" ? [] : [[`Δ ${data.baseline}`, (m) => (same(data.baseline) || !known(m.vs_baseline) ? "" : `${number(m.vs_baseline, true)} ${interval(m.vs_baseline_low, m.vs_baseline_high, true)}`)]]),
      [`p against ${data.baseline}, adjusted`, p],
      ["win, tie, loss", (m) => (known(m.p) ? `${count(m.win)}, ${count(m.tie)}, ${count(m.loss)}` : "")],
      ["flips against full", (m, name) => (name === "score" ? percent(m.flips) : "")],
      ["smallest difference it could see", (m) => number(m.smallest_difference)],
    ].map(([label, show]) => [label, measured.map(({ name }) => show(cell.metrics[name], name) ?? "")]).filter(([, shown]) => shown.some(Boolean));
    return part("Quality", make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Quality" }, make("table", {},
      make("thead", {}, make("tr", {}, make("td"), measured.map(({ label, better }) => make("th", { scope: "col", class: "number" }, label, make("span", { class: "interval", title: `${better} is better` }, better === "higher" ? " ↑" : " ↓"))))),
      make("tbody", {}, rows.map(([label, shown]) => make("tr", {}, make("th", { scope: "row" }, label), shown.map((one) => make("td", { class: "number" }, one))))))));
  }

  function bytes(cell) {
    if (!known(cell.bytes_held)) return [];
    const exact = (x) => (known(x) ? `${count(x)} (${mebi(x)} MiB)` : "");
    const tiers = Object.entries(cell.tiers ?? {}).filter(([, rows]) => rows > 0);
    const all = Math.max(cell.tokens_context ?? 0, tiers.reduce((sum, [, rows]) => sum + rows, 0));
    let x = 0;
    const bar = draw("svg", { class: "tiers", viewBox: "0 0 100 4", width: "100%", height: 16, preserveAspectRatio: "none", "aria-hidden": "true" },
      tiers.map(([, rows], i) => {
        const width = (100 * rows) / all;
        x += width;
        return draw("rect", { class: ["scorer", "codec", "router", "merging", "retrieval", "pattern"][i % 6], fill: "currentColor", x: x - width, y: 0, width, height: 4, "vector-effect": "non-scaling-stroke" });
      }),
      x < 99.9 ? draw("rect", { x, y: 0, width: 100 - x, height: 4, fill: "currentColor", opacity: 0.08 }) : "");
    return part("Bytes",
      pairs([["held", `${exact(cell.bytes_held)}, ${percent(cell.share)} of full`], ["full cache", exact(cell.bytes_full)],
        ["read per step", exact(cell.bytes_read)], ["of held, in the host's memory", cell.bytes_offloaded ? exact(cell.bytes_offloaded) : ""],
        ["shared by all contexts, apart", cell.bytes_shared ? exact(cell.bytes_shared) : ""],
        ["tokens kept, of the context's", known(cell.tokens_kept) ? `${cell.tokens_kept.toFixed(1)} of ${cell.tokens_context.toFixed(1)} a KV head (means)` : ""],
        ...Object.entries(cell.tier_bytes ?? {}).map(([name, held]) => [`tier ${name}`, exact(held)]),
        ...tiers.map(([name, rows]) => [`tier ${name}`, `${rows.toFixed(1)} tokens a KV head, ${percent(rows / all)} of the context`])]),
      tiers.length ? bar : "");
  }

  function answers(cell) {
    if (!cell.examples.length) return [];
    const full = cells[cell.full];
    const beside = new Map(full && full !== cell ? full.examples.map((one) => [one.id, one]) : []);
    const box = (title, shown) => (known(shown) ? make("div", {}, make("p", {}, title), make("pre", { dir: "auto" }, shown)) : "");
    const facts = (one) => data.metrics.filter(({ name }) => known(one[name])).map(({ name, label }) => `${label} ${number(one[name])}`).join(", ");
    return part("Examples", make("p", { class: "note" }, `The first ${cell.examples.length} of its records, not a choice of good or bad ones.`),
      cell.examples.map((one) => make("div", { class: "example" },
        make("p", {}, [one.id, one.cluster_id, one.info].filter(Boolean).join(" · ")),
        make("p", {}, facts(one)),
        make("div", { class: "texts" }, box("This cell's answer", one.answer), box("The full cache's", beside.get(one.id)?.answer), box("Reference", one.target)))));
  }

  function machine(process) {
    const { device, cpu, gpu, cores } = process.hardware ?? {};
    return !device || device === "cpu" ? `CPU: ${cpu ?? "unknown"}${cores ? `, ${cores} cores` : ""}` : [device, gpu].filter(Boolean).join(" ");
  }

  function seconds(cell) {
    const [s, ms] = [(x) => (known(x) ? `${number(x)} s` : ""), (x) => (known(x) ? `${number(1000 * x)} ms` : "")];
    const entries = [["prefill", s(cell.prefill_s)], ["plan and pack", s(cell.compress_s)], ["time to first token", s(cell.ttft_s)],
      ["time per token", ms(cell.tpot_s)], ["energy per token", known(cell.joules_token) ? `${number(cell.joules_token)} J` : ""],
      ["own time per token, share of the full cache's", known(cell.own_ratio) ? `${number(cell.own_ratio)} ${interval(cell.own_ratio_low, cell.own_ratio_high)}${cell.solo ? ` (measured alone, path ${cell.solo.path}, on ${cell.solo.machine})` : ""}` : ""]];
    if (!entries.some(([, shown]) => shown)) return [];
    const machines = [...new Set(cell.processes.map((i) => machine(data.processes[i])))].join("; ");
    return part("Seconds and energy", make("p", { class: "note" }, `Measured on ${machines}. Not comparable between machines; nothing is ranked by them.`), pairs(entries));
  }

  function provenance(cell) {
    const processes = cell.processes.map((i) => data.processes[i]);
    const told = (process) => [
      ["commit", process.commit ? process.commit + (process.dirty ? " (with uncommitted changes)" : "") : "unknown: not run from a checkout"],
      ["versions", Object.entries({ python: process.python, ...process.versions }).filter(([, v]) => v).map((one) => one.join(" ")).join(", ")],
      ["hardware", flat(process.hardware ?? {}).map(([name, shown]) => `${name} ${shown}`).join(", ")],
    ];
    return part("Provenance",
      pairs([["cell", cell.cell], ["folder", cell.folder], ["status", cell.status + (cell.finished ? `, ${cell.finished}` : "")], ["method", JSON.stringify(cell.options)],
        ["family, trust", [cell.family, cell.trust].filter(Boolean).join(", ")], ["training", cell.training],
        ["looks at the last queries", known(cell.query_aware) ? (cell.query_aware ? "yes" : "no") : ""],
        ...flat(cell.about).map(([name, shown]) => [name, shown]), ...processes.flatMap(told)]));
  }

  function again(cell) {
    const process = data.processes[cell.processes.at(-1)];
    const runs = [cell, ...cell.beside.map((i) => cells[i])].map((one) => one.command);
    const block = (lines) => {
      const shown = make("pre", { tabindex: 0 }, lines.join("\n"));
      const button = make("button", { type: "button" }, "Copy");
      button.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(shown.textContent);
          button.textContent = "Copied";
        } catch {
          getSelection().selectAllChildren(shown); // not allowed: at least it is chosen
        }
      });
      return [shown, button];
    };
    return part("Make it again",
      make("p", { class: "note" }, `The numbers from these records: the rows with cell ${cell.cell} of the table that this writes.`), block([data.aggregate]),
      make("p", { class: "note" }, `The records, and the numbers from them${runs.length > 1 ? "; what the cell is compared with is run too" : ""}. Adjusted p-values depend on all comparisons of a table.${process?.dirty ? " They were made with uncommitted changes: the commit alone may differ." : ""}`),
      block([...(process?.commit ? [`git checkout ${process.commit}`] : []), ...runs, cell.again]));
  }

  // ---- theme ----------------------------------------------------------------------------------------------------

  const THEMES = ["auto", "light", "dark"];
  let theme = "auto";
  try { theme = localStorage.getItem("kvbench-theme") ?? "auto"; } catch { /* no storage for files: auto */ }
  function setTheme(name) {
    theme = THEMES.includes(name) ? name : "auto";
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    at("theme").textContent = `Theme: ${theme}`;
    try { localStorage.setItem("kvbench-theme", theme); } catch { /* as above */ }
  }
  at("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length]));

  // ---- all of it ------------------------------------------------------------------------------------------------

  function render() {
    const shown = chosen();
    renderPlot(shown);
    renderHead();
    renderTable(shown);
  }
  let waiting = 0;
  function update() {
    writeState();
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(render);
  }

  function summary() {
    const constant = Object.entries({ ...SETTING, family: "Family", training: "Training", trust: "Trust" })
      .filter(([name]) => values(name).length === 1 && known(cells[0][name])).map(([name, label]) => `${label}: ${cells[0][name]}`);
    at("constant").textContent = constant.length ? `The same for all cells: ${constant.join("; ")}.` : "";
    const commits = Object.keys(data.commits).map((commit) => commit.slice(0, 10));
    const ended = cells.map((cell) => cell.finished).filter(Boolean).sort();
    at("summary").textContent = [plural(cells.length, "cell"), plural(values("method").length, "method"), plural(values("task").length, "task"), plural(values("model").length, "model"),
      commits.length ? `commit${commits.length > 1 ? "s" : ""} ${commits.slice(0, 3).join(", ")}${commits.length > 3 ? ", …" : ""}` : null,
      ended.length ? `records of ${[...new Set([ended[0], ended.at(-1)].map((time) => time.slice(0, 10)))].join(" to ")}` : null].filter(Boolean).join(" · ");
  }

  function openAsked() {
    const asked = cells.find((cell) => cell.cell === state.cell);
    if (asked) open(asked);
  }

  setTheme(theme);
  readState();
  buildFilters();
  buildHead();
  showState();
  summary();
  render();
  openAsked();
  addEventListener("hashchange", () => {
    if (location.hash === "#cells") return;
    readState();
    showState();
    render();
    openAsked();
  });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; cancelAnimationFrame(waiting); waiting = requestAnimationFrame(render); } });
})();
