// The interactive part of the page of csg-ext report: pictures and filters of the chosen run, from the data in the page.
"use strict";
(() => {
  const MOST_TICKS = 40, MOST_CARDS = 60, CARD_IMAGES = 3, SHOWN_MAPS = 12, NAME_LENGTH = 24;
  const UNITS = { gate: "gate entry", mi: "mutual information, nats" };
  const NAMES = { gate: "gate", mi: "mutual information" };
  const content = JSON.parse(document.getElementById("content").textContent);
  const at = (id) => document.getElementById(id);
  const frame = at("matrix-frame"), plot = at("matrix"), cursor = at("cursor"), tip = at("tip");
  let run, network, matrix;  // what is shown
  let columns = [];  // the filters in the order of the heat map's columns
  let cell = null;  // { row, column } of the heat map
  let kept = null;  // the filter that a click or Enter kept
  let image = null;  // the gallery's image that is picked

  // ---- data

  function bytes(text) {
    return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  }

  /** A quantised matrix (classes, filters) with every filter's own class (-1: dead) and its largest value. */
  function decode(stored) {
    const raw = bytes(stored.values);
    const quanta = stored.bits === 16 ? new Uint16Array(raw.buffer) : raw;
    const values = Float64Array.from(quanta, (q) => stored.low + stored.step * q);
    const [classes, filters] = stored.shape;
    const best = new Float64Array(filters).fill(-Infinity);
    for (let c = 0; c < classes; c++) {
      for (let k = 0; k < filters; k++) best[k] = Math.max(best[k], values[c * filters + k]);
    }
    return { values, classes, filters, own: stored.own, best, value: (c, k) => values[c * filters + k] };
  }

  /** The matrix of a kind of the network shown, decoded once; null where it has none. */
  function matrixOf(kind) {
    network.decoded ??= {};
    if (!(kind in network.decoded)) network.decoded[kind] = network[kind] ? decode(network[kind]) : null;
    return network.decoded[kind];
  }

  function sorted(order, only) {
    const filters = [];
    for (let k = 0; k < matrix.filters; k++) if (only < 0 || matrix.own[k] === only) filters.push(k);
    const byValue = (a, b) => matrix.best[b] - matrix.best[a] || a - b;
    const rank = (k) => (matrix.own[k] < 0 ? matrix.classes : matrix.own[k]);  // dead ones come last
    if (order === "class") filters.sort((a, b) => rank(a) - rank(b) || byValue(a, b));
    if (order === "value") filters.sort(byValue);
    return filters;
  }

  // ---- elements; names are only ever set as text

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function fill(select, options, chosen) {
    select.replaceChildren(...options.map(([value, text]) => {
      const option = element("option", { value }, text);
      option.selected = String(value) === String(chosen);
      return option;
    }));
  }

  function facts(list, pairs) {
    list.replaceChildren(...pairs.map(([key, value]) =>
      element("div", {}, element("dt", {}, key), element("dd", {}, value))));
  }

  function number(value) {
    return value.toFixed(4);
  }

  /** An image of the sprite; overlay, when given, is a map whose bytes become the opacity of orange. */
  function picture(index, label, overlay = null, hidden = false) {
    const { side, size, columns: across } = run.sprite, scale = Math.ceil(96 / side);
    const [width, height] = size.map((extent) => extent * scale);
    const canvas = element("canvas", { width, height });
    if (hidden) canvas.setAttribute("aria-hidden", "true");
    else { canvas.setAttribute("role", "img"); canvas.setAttribute("aria-label", label); canvas.title = label; }
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const x = (index % across) * side, y = Math.floor(index / across) * side;
    context.drawImage(run.sprite.picture, x, y, ...size, 0, 0, width, height);
    if (overlay) {
      const small = element("canvas", { width: overlay.width, height: overlay.height });
      const colours = new ImageData(overlay.width, overlay.height);
      overlay.values.forEach((v, i) => colours.data.set([255, 120, 0, v], 4 * i));
      small.getContext("2d").putImageData(colours, 0, 0);
      context.fillStyle = "rgba(0, 0, 0, 0.35)";
      context.fillRect(0, 0, width, height);
      context.imageSmoothingEnabled = true;
      context.drawImage(small, 0, 0, width, height);
    }
    return canvas;
  }

  function imageName(index) {
    return `test image ${run.sprite.images[index]}, ${className(index)}`;
  }

  function className(index) {
    return run.classes[run.sprite.labels[index]];
  }

  function captioned(canvas, caption) {
    return element("figure", {}, canvas, element("figcaption", {}, caption));
  }

  // ---- the heat map

  /** Text for Plotly, which reads a little markup: names stay as they are. */
  function plain(text) {
    const short = text.length > NAME_LENGTH ? text.slice(0, NAME_LENGTH - 1) + "…" : text;
    return short.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  function ticks(count, text, most = MOST_TICKS) {
    const step = Math.max(1, Math.ceil(count / most));
    const values = Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
    return { tickmode: "array", tickvals: values, ticktext: values.map(text) };
  }

  function drawMatrix() {
    const kind = at("kind").value;
    matrix = matrixOf(kind);
    columns = sorted(at("order").value, Number(at("class").value));
    cell = null;
    cursor.hidden = tip.hidden = true;
    const z = Array.from({ length: matrix.classes }, (_, c) => Float64Array.from(columns, (k) => matrix.value(c, k)));
    const style = getComputedStyle(document.body), narrow = plot.clientWidth < 600;
    const line = style.getPropertyValue("--line").trim();
    const longest = Math.min(NAME_LENGTH, Math.max(...run.classes.map((name) => name.length)));
    const left = 20 + 7 * longest, digit = narrow ? 7 : 8, digits = String(matrix.filters - 1).length;
    const most = Math.max(2, Math.min(32, Math.floor((plot.clientWidth - left - 110) / (digit * digits + 12))));
    const axis = { showgrid: false, zeroline: false, linecolor: line, fixedrange: false };
    Plotly.react(plot, [{
      type: "heatmap", z, zmin: 0, zmax: kind === "gate" ? 1 : run.bound, colorscale: "Cividis", hoverinfo: "none",
      colorbar: { title: { text: UNITS[kind], side: "right" }, thickness: narrow ? 8 : 14, xpad: 4 },
    }], {
      height: 130 + Math.min(520, Math.max(220, 24 * matrix.classes)),
      margin: { l: left, r: 10, t: 10, b: 55 },
      font: { color: style.color, size: narrow ? 10 : 12, family: style.fontFamily },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: { ...axis, ...ticks(columns.length, (i) => String(columns[i]), most), tickangle: 0,
        title: { text: `filter (${columns.length} of ${matrix.filters})` } },
      yaxis: { ...axis, ...ticks(matrix.classes, (c) => plain(run.classes[c])), autorange: "reversed" },
    }, { displaylogo: false, responsive: true, displayModeBar: false });
    const source = at("network").selectedOptions[0].text;
    at("matrix-label").textContent =
      `${NAMES[kind]} of ${source}, ${matrix.classes} classes by ${columns.length} filters`;
    at("status").textContent = "";
  }

  function describe(c, k) {
    const kind = at("kind").value;
    const unit = kind === "mi" ? " nats" : "";
    return `Filter ${k}${matrix.own[k] < 0 ? " (dead)" : ""}, class ${run.classes[c]}: ${NAMES[kind]} ${number(matrix.value(c, k))}${unit}`;
  }

  function showCell(row, column) {
    cell = { row, column };
    const text = describe(row, columns[column]);
    if (at("status").textContent !== text) at("status").textContent = text;
    showFilter(columns[column], row);
  }

  function showCursor() {
    const { xaxis, yaxis } = plot._fullLayout;
    const [x0, x1] = [cell.column - 0.5, cell.column + 0.5].map((v) => xaxis.d2p(v) + xaxis._offset);
    const [y0, y1] = [cell.row - 0.5, cell.row + 0.5].map((v) => yaxis.d2p(v) + yaxis._offset);
    Object.assign(cursor.style, {
      left: `${plot.offsetLeft + x0 - 2}px`, top: `${plot.offsetTop + Math.min(y0, y1) - 2}px`,
      width: `${x1 - x0}px`, height: `${Math.abs(y1 - y0)}px`,
    });
    cursor.hidden = false;
  }

  function onKey(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || !columns.length) return;
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const now = cell ?? { row: 0, column: 0 };
    const clamp = (value, size) => Math.min(size - 1, Math.max(0, value));
    let { row, column } = now;
    if (event.key in moves) {
      if (cell) {
        row = clamp(row + moves[event.key][0], matrix.classes);
        column = clamp(column + moves[event.key][1], columns.length);
      }
    } else if (event.key === "Home") column = 0;
    else if (event.key === "End") column = columns.length - 1;
    else if (event.key === "Enter") keep(columns[column]);
    else return;
    event.preventDefault();
    showCell(row, column);
    showCursor();
  }

  // ---- panels

  function showFilter(k, c) {
    const gate = matrixOf("gate"), mi = matrixOf("mi");
    at("filter-title").textContent = `Filter ${k}${k === kept ? " (kept)" : ""}`;
    const pairs = [["class", run.classes[c]]];
    if (gate) pairs.push(["gate entry", number(gate.value(c, k))]);
    pairs.push(["mutual information", `${number(mi.value(c, k))} nats`]);
    const dead = mi.own[k] < 0;
    if (dead) pairs.push(["its class", "none: it is dead"]);
    if (gate && !dead) pairs.push(["its class by the gate", run.classes[gate.own[k]]]);
    if (!dead) pairs.push(["its class by mutual information", run.classes[mi.own[k]]]);
    facts(at("filter-facts"), pairs);
    const top = network.top[k];
    const figures = (top ?? []).map((index) => captioned(picture(index, imageName(index)), className(index)));
    const none = dead ? "It is dead: one activation on all test images."
      : top ? "It is never active on the test images." : "Its top images did not fit the page's size.";
    at("filter-images").replaceChildren(...(figures.length ? figures : [element("p", { class: "note" }, none)]));
  }

  function keep(k) {
    kept = k;
    showFilter(k, cell ? cell.row : Math.max(0, matrix.own[k]));
    for (const button of at("class-filters").querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(Number(button.dataset.filter) === k));
    }
    if (image !== null) showMaps();
  }

  function showClass() {
    const c = Number(at("class").value), kind = at("kind").value;
    if (c < 0) {
      at("class-title").textContent = "Filters of a class";
      at("class-note").textContent = "Pick a class under “Filters of”.";
      at("class-filters").replaceChildren();
      return;
    }
    at("class-title").textContent = `Filters of ${run.classes[c]}`;
    at("class-note").textContent =
      `${columns.length} of ${matrix.filters} filters have their largest value (${NAMES[kind]}) here` +
      (columns.length > MOST_CARDS ? `; the first ${MOST_CARDS} are listed.` : ".");
    at("class-filters").replaceChildren(...columns.slice(0, MOST_CARDS).map((k) => {
      const value = number(matrix.value(c, k));
      const images = (network.top[k] ?? []).slice(0, CARD_IMAGES).map((index) => picture(index, "", null, true));
      const button = element("button", { type: "button", "data-filter": k, "aria-pressed": String(k === kept) });
      button.append(`filter ${k} · ${value}`, element("div", { class: "row" }, ...images));
      button.addEventListener("click", () => {
        cell = { row: c, column: columns.indexOf(k) };
        keep(k);
        at("status").textContent = describe(c, k);
        showCursor();
      });
      return element("li", {}, button);
    }));
  }

  function showGallery() {
    at("gallery").replaceChildren(...network.gallery.map((_, i) => {
      const index = run.gallery[i], name = imageName(index);
      const button = element("button", { type: "button", "aria-label": name, "aria-pressed": String(i === image),
        title: name }, picture(index, "", null, true));
      button.addEventListener("click", () => {
        image = i;
        [...at("gallery").children].forEach((other, j) => other.setAttribute("aria-pressed", String(i === j)));
        showMaps();
      });
      return button;
    }));
    if (image === null) { at("maps").replaceChildren(); at("image-status").textContent = ""; } else showMaps();
  }

  function showMaps() {
    const entry = network.gallery[image], index = run.gallery[image];
    const predicted = run.classes[entry.predicted], [height, width] = network.map_shape;
    at("image-status").textContent = `${imageName(index).replace("test", "Test")}: predicted ${predicted} ` +
      `(${(100 * entry.probability).toFixed(1)} %)`;
    entry.decoded ??= bytes(entry.maps);
    const size = width * height;
    const map = (i) => ({ width, height, values: entry.decoded.subarray(i * size, (i + 1) * size) });
    const figures = [
      captioned(picture(index, imageName(index)), "the image"),
      captioned(picture(index, `class activation map of ${predicted}`, map(0)), `all filters, for ${predicted}`),
    ];
    const shown = entry.filters.map((_, i) => i).filter((i) => i < SHOWN_MAPS || entry.filters[i] === kept);
    shown.sort((a, b) => (entry.filters[b] === kept) - (entry.filters[a] === kept) || a - b);
    for (const i of shown) {
      const k = entry.filters[i], added = entry.added[i];
      const text = `filter ${k}${k === kept ? " (kept)" : ""}: ${added < 0 ? "−" : "+"}${Math.abs(added).toFixed(2)}`;
      figures.push(captioned(picture(index, `map of filter ${k}`, map(i + 1)), text));
    }
    at("maps").replaceChildren(...figures);
  }

  // ---- choices

  function chooseRun() {
    run = content.runs[Number(at("run").value)];
    image = null;
    fill(at("network"), run.networks.map((n, i) => [i, n.name]), run.networks.length - 1);
    fill(at("class"), [[-1, "all classes"], ...run.classes.map((name, i) => [i, name])], -1);
    chooseNetwork();
  }

  function chooseNetwork() {
    network = run.networks[Number(at("network").value)];
    kept = null;
    const kinds = ["gate", "mi"].filter((kind) => network[kind]);
    const before = at("kind").value;
    fill(at("kind"), kinds.map((kind) => [kind, NAMES[kind]]), kinds.includes(before) ? before : kinds[0]);
    at("notes").textContent = network.notes.join(" ");
    at("filter-title").textContent = "Filter";
    facts(at("filter-facts"), []);
    at("filter-images").replaceChildren();
    update();
    showGallery();
  }

  function update() {
    drawMatrix();
    showClass();
  }

  function start() {
    fill(at("run"), content.runs.map((r, i) => [i, r.name]), 0);
    chooseRun();
    plot.on("plotly_hover", ({ points, event }) => {
      cursor.hidden = true;
      showCell(Math.round(points[0].y), Math.round(points[0].x));
      tip.textContent = describe(cell.row, columns[cell.column]);
      tip.hidden = false;
      const left = event.clientX + 14, top = event.clientY + 14;
      tip.style.left = `${Math.max(4, Math.min(left, innerWidth - tip.offsetWidth - 4))}px`;
      tip.style.top = `${top + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 8 : top}px`;
    });
    plot.on("plotly_unhover", () => { tip.hidden = true; });
    plot.on("plotly_click", ({ points }) => keep(columns[Math.round(points[0].x)]));
    plot.on("plotly_relayout", () => { cursor.hidden = true; });
    frame.addEventListener("keydown", onKey);
    frame.addEventListener("blur", () => { cursor.hidden = true; });
    at("run").addEventListener("change", chooseRun);
    at("network").addEventListener("change", chooseNetwork);
    for (const id of ["kind", "order", "class"]) at(id).addEventListener("change", update);
    const dark = matchMedia("(prefers-color-scheme: dark)");
    dark.addEventListener("change", drawMatrix);
    at("theme").addEventListener("click", () => {
      const root = document.documentElement, now = root.dataset.theme ?? (dark.matches ? "dark" : "light");
      root.dataset.theme = now === "dark" ? "light" : "dark";
      drawMatrix();
    });
    document.documentElement.dataset.ready = "true";
  }

  Promise.all(content.runs.map(async (r) => {
    r.sprite.picture = new Image();
    r.sprite.picture.src = r.sprite.source;
    await r.sprite.picture.decode();
  })).then(start);
})();
