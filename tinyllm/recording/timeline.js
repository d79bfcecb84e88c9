"use strict";
// The page: draws the run, and lets one step through it. What a recording says reaches it as text or as numbers only.

function start() {
  const $ = (id) => document.getElementById(id);
  const data = decode(JSON.parse($("data").textContent));
  const { steps } = data;
  document.title = `tinyllm timeline: ${printable(data.model)}`;
  $("model").textContent = printable(data.model);
  for (const element of document.querySelectorAll(".block-size")) element.textContent = number(data.blockSize);
  $("facts").textContent = `${plural(steps.length, "step")}, ${plural(data.requests.length, "request")}, ` +
    `${plural(steps.reduce((sum, s) => sum + s.tokens, 0), "token")} computed; ${number(data.numBlocks)} blocks of ` +
    `${data.blockSize} tokens; at most ${number(data.budget)} tokens a step; ` +
    `fingerprint ${printable(data.fingerprint)}`;
  const unused = data.numBlocks - data.usedBlocks;
  $("unused").textContent = unused ? `The other ${plural(unused, "block")} were never used.` : "";
  if (!steps.length) {
    $("facts").textContent += ". No step was recorded.";
    for (const element of document.querySelectorAll("section, main, footer")) element.hidden = true;
    return;
  }

  const history = new BlockHistory(data);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const maxTokens = Math.max(1, steps.reduce((most, s) => Math.max(most, s.tokens), 0));
  const leastFree = steps.reduce((least, s) => Math.min(least, s.free), data.numBlocks);
  $("free-range").textContent = `from ${number(leastFree)} to ${number(data.numBlocks)}`;
  let selected = 0, hovered = -1, theme = {}, map = null;
  let barWidth = Math.max(12, Math.min(40, Math.floor($("steps").clientWidth / steps.length)));

  const readTheme = () => {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["paper", "ink", "soft", "line", "panel", "mark", "bad", "warn", "copy", "bar"])
      theme[name] = style.getPropertyValue(`--${name}`).trim();
    theme.stripes = new Map();
  };

  const colour = (request, light = false) => {
    const hue = Math.round((request * 137.508 + 212) % 360), s = dark.matches ? 50 : 58;
    const l = dark.matches ? (light ? 34 : 60) : (light ? 82 : 52);
    return `hsl(${hue} ${s}% ${l}%)`;
  };

  // A canvas in CSS pixels, sharp on any screen.
  const surface = (canvas, height) => {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth;
    if (height !== undefined) canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(canvas.clientHeight * ratio);
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.clearRect(0, 0, width, canvas.clientHeight);
    context.font = "11px system-ui, sans-serif";
    return [context, width, canvas.clientHeight];
  };

  const stripes = (request) => {
    if (!theme.stripes.has(request)) {
      const tile = document.createElement("canvas");
      tile.width = tile.height = 8;
      const context = tile.getContext("2d");
      context.fillStyle = colour(request, true);
      context.fillRect(0, 0, 8, 8);
      context.strokeStyle = colour(request);
      context.lineWidth = 2;
      for (const x of [-8, 0, 8]) {
        context.moveTo(x, 8);
        context.lineTo(x + 8, 0);
      }
      context.stroke();
      theme.stripes.set(request, context.createPattern(tile, "repeat"));
    }
    return theme.stripes.get(request);
  };

  // -- the whole run: one column a pixel, the most of the steps in it

  const drawOverview = () => {
    const [context, width, height] = surface($("overview"));
    const bottom = height - 8, columns = Math.min(width, steps.length), each = width / columns;
    context.fillStyle = theme.bar;
    const lows = [];
    for (let x = 0; x < columns; x++) {
      const from = Math.floor(x * steps.length / columns);
      const to = Math.max(from + 1, Math.floor((x + 1) * steps.length / columns));
      let tokens = 0, free = Infinity, marks = 0;
      for (let i = from; i < to; i++) {
        const step = steps[i];
        tokens = Math.max(tokens, step.tokens);
        free = Math.min(free, step.free);
        marks |= (step.raw.p ? 1 : 0) | (step.raw.e ? 2 : 0) | (step.raw.c ? 4 : 0);
      }
      lows.push(free);
      context.fillStyle = theme.bar;
      const tall = Math.sqrt(tokens / maxTokens) * (bottom - 4);
      context.fillRect(x * each, bottom - tall, Math.max(1, each - (each > 3 ? 1 : 0)), tall);
      if (marks) {
        context.fillStyle = marks & 1 ? theme.bad : marks & 2 ? theme.warn : theme.copy;
        context.fillRect(x * each, bottom + 2, Math.max(2, each - 1), 5);
      }
    }
    context.strokeStyle = theme.mark;
    context.lineWidth = 1.5;
    context.beginPath();
    lows.forEach((free, x) => {
      const y = 3 + (data.numBlocks - free) / Math.max(1, data.numBlocks - leastFree) * (bottom - 5);
      context.lineTo(x * each, y);
      context.lineTo((x + 1) * each, y);
    });
    context.stroke();
    context.strokeStyle = theme.ink;
    context.lineWidth = 1;
    context.strokeRect(selected / steps.length * width, .5, Math.max(2, width / steps.length), height - 1);
  };

  // -- the steps around the selected one

  const firstShown = (width) => {
    const shown = Math.max(1, Math.floor(width / barWidth));
    return Math.max(0, Math.min(selected - Math.floor(shown / 2), steps.length - shown));
  };

  const drawSteps = () => {
    const [context, width, height] = surface($("steps"));
    const first = firstShown(width), last = Math.min(steps.length, first + Math.ceil(width / barWidth));
    const top = 18, bottom = height - 16, most = Math.max(...steps.slice(first, last).map((s) => s.tokens));
    context.textAlign = "center";
    for (let i = first; i < last; i++) {
      const step = steps[i], x = (i - first) * barWidth, wide = Math.max(1, barWidth - (barWidth > 4 ? 2 : 0));
      const tall = Math.sqrt(step.tokens / most) * (bottom - top);
      if (i === selected) {
        context.fillStyle = theme.line;
        context.fillRect(x - 1, 0, barWidth, height);
      }
      // a segment a sequence, none thinner than a pixel or two, as far as there is room
      const ran = step.ran, least = Math.min(2, tall / Math.max(1, ran.length)), rest = tall - least * ran.length;
      let y = bottom;
      for (const [sequence, begin, count] of ran) {
        const high = least + rest * count / step.tokens, request = data.sequences[sequence][0];
        context.fillStyle = isPrefill(data, sequence, begin, count) ? stripes(request) : colour(request);
        context.fillRect(x, y - high, wide, Math.max(.5, high - (high > 4 ? 1 : 0)));
        y -= high;
      }
      const marks = [[step.preempted, "P", "bad"], [step.evicted, "E", "warn"], [step.copies, "C", "copy"]];
      let line = bottom - tall - 3;
      for (const [items, letter, tone] of marks) {
        if (!items.length) continue;
        context.fillStyle = theme[tone];
        if (barWidth >= 8) context.fillText(letter, x + wide / 2, Math.max(10, line));
        else context.fillRect(x, Math.max(2, line - 3), wide, 3);
        line -= 10;
      }
      if (step.number % Math.ceil(60 / barWidth) === 0) {
        context.fillStyle = theme.soft;
        context.fillText(number(step.number), x + wide / 2, height - 4);
      }
    }
    $("tallest").textContent = plural(most, "token");
  };

  // -- the blocks

  const drawBlock = (context, x, y, size, state, marks) => {
    const requests = [...new Set(state.owners.map(([s]) => data.sequences[s][0]))].slice(0, 4);
    const inner = size - (size > 6 ? 2 : 1);
    if (!requests.length) {
      context.strokeStyle = theme.line;
      context.lineWidth = 1;
      context.strokeRect(x + .5, y + .5, inner - 1, inner - 1);
    }
    requests.forEach((request, i) => {
      context.fillStyle = colour(request);
      context.fillRect(x + i * inner / requests.length, y, inner / requests.length, inner);
    });
    if (state.cached) {
      const dot = Math.max(2, size / (requests.length ? 5 : 3)), at = requests.length ? 1 : (inner - dot) / 2;
      context.fillStyle = requests.length ? theme.paper : theme.soft;
      context.fillRect(x + at, y + at, dot, dot);
    }
    if (state.owners.length > 1) {
      if (size >= 15) {
        context.fillStyle = theme.paper;
        context.font = `bold ${Math.min(13, size - 6)}px system-ui, sans-serif`;
        context.textAlign = "center";
        context.fillText(String(state.owners.length), x + inner / 2, y + inner / 2 + size / 4.5);
      } else {
        context.strokeStyle = theme.paper;
        context.lineWidth = 1;
        context.strokeRect(x + inner / 4, y + inner / 4, inner / 2, inner / 2);
      }
    }
    const frame = (tone, dash = []) => {
      context.strokeStyle = tone;
      context.lineWidth = size >= 12 ? 2.5 : 1.5;
      context.setLineDash(dash);
      context.strokeRect(x + 1, y + 1, inner - 2, inner - 2);
      context.setLineDash([]);
    };
    if (marks.taken) frame(theme.ink);
    if (marks.released) frame(theme.soft, [2, 2]);
    if (marks.source) frame(theme.copy, [3, 2]);
    if (marks.target) frame(theme.copy);
    if (marks.evicted) {
      context.strokeStyle = theme.warn;
      context.lineWidth = size >= 12 ? 2.5 : 1.5;
      context.beginPath();
      context.moveTo(x + 1, y + 1);
      context.lineTo(x + inner - 1, y + inner - 1);
      context.moveTo(x + inner - 1, y + 1);
      context.lineTo(x + 1, y + inner - 1);
      context.stroke();
    }
  };

  // What happened to blocks in the selected step: block -> marks.
  const blockMarks = (step) => {
    const marks = new Map(), before = history.after(selected - 1).slice();
    const mark = (block, name) => marks.set(block, { ...marks.get(block), [name]: true });
    for (const change of step.changes) {
      const held = before[change.block].owners.length > 0, holds = change.owners.length > 0;
      if (!held && holds) mark(change.block, "taken");
      if (held && !holds) mark(change.block, "released");
    }
    for (const [source, target] of step.copies) {
      mark(source, "source");
      mark(target, "target");
    }
    for (const block of step.evicted) mark(block, "evicted");
    return marks;
  };

  const layout = (width) => {
    let size = 36;
    while (size > 2 && Math.ceil(data.usedBlocks / Math.floor(width / size)) * size > 480) size -= 1;
    const columns = Math.max(1, Math.floor(width / size));
    return { size, columns, height: Math.max(size, Math.ceil(data.usedBlocks / columns) * size) };
  };

  const drawBlocks = () => {
    const canvas = $("blocks");
    map = layout(canvas.clientWidth);
    const [context] = surface(canvas, map.height);
    const marks = blockMarks(steps[selected]), state = history.after(selected), none = {};
    for (let block = 0; block < state.length; block++) {
      const x = (block % map.columns) * map.size, y = Math.floor(block / map.columns) * map.size;
      drawBlock(context, x, y, map.size, state[block], marks.get(block) || none);
    }
    if (hovered >= 0) $("block").textContent = blockStory(data, hovered, state[hovered]);
  };

  const drawLegend = () => {
    const [context, width] = surface($("legend")), owner = [[0, 0]];
    const items = [
      ["free", UNTOUCHED, {}], ["free, cached", { cached: true, owners: [] }, {}],
      ["held", { cached: false, owners: owner }, {}], ["held, cached", { cached: true, owners: owner }, {}],
      ["shared by 2", { cached: false, owners: [...owner, ...owner] }, {}],
      ["taken in this step", UNTOUCHED, { taken: true }], ["given back", UNTOUCHED, { released: true }],
      ["copied from", UNTOUCHED, { source: true }], ["copied to", UNTOUCHED, { target: true }],
      ["cached content given up", UNTOUCHED, { evicted: true }],
    ];
    let x = 0, y = 2;
    for (const [label, state, marks] of items) {
      context.font = "12px system-ui, sans-serif";
      const wide = 24 + context.measureText(label).width + 14;
      if (x + wide > width) [x, y] = [0, y + 22];
      if (data.sequences.length || !state.owners.length) drawBlock(context, x, y, 18, state, marks);
      context.font = "12px system-ui, sans-serif";
      context.textAlign = "left";
      context.fillStyle = theme.soft;
      context.fillText(label, x + 22, y + 13);
      x += wide;
    }
    const needed = y + 22;
    if ($("legend").clientHeight !== needed) {
      $("legend").style.height = `${needed}px`;
      drawLegend();
    }
  };

  // -- the step in words

  const drawSide = () => {
    const step = steps[selected], state = history.after(selected);
    $("title").textContent = `Step ${number(step.number)}: ${plural(step.tokens, "token")}, ` +
      `${(seconds(data, selected) * 1000).toFixed(1)} ms`;
    $("story").replaceChildren(...story(data, step).map(([kind, sentence]) => {
      const item = document.createElement("li");
      item.className = kind;
      item.textContent = sentence;
      return item;
    }));
    const cached = state.reduce((sum, s) => sum + (s.cached && !s.owners.length ? 1 : 0), 0);
    $("now").textContent =
      `${number(step.free)} of ${plural(data.numBlocks, "block")} free, ${number(cached)} of them cached; ` +
      `${plural(step.running, "sequence")} running, ${number(step.waiting)} waiting.`;
    const holders = new Map();
    for (const { owners } of state) {
      for (const [sequence] of new Map(owners.map((owner) => [data.sequences[owner[0]][0], owner])).values()) {
        const request = data.sequences[sequence][0];
        const entry = holders.get(request) || { blocks: 0, shared: 0, members: new Set() };
        entry.blocks += 1;
        entry.shared += owners.length > 1 ? 1 : 0;
        holders.set(request, entry);
      }
      for (const [sequence] of owners) holders.get(data.sequences[sequence][0]).members.add(sequence);
    }
    const rows = [...holders].sort((a, b) => a[0] - b[0]).slice(0, 100).map(([request, entry]) => {
      const row = document.createElement("tr"), swatch = document.createElement("canvas");
      swatch.width = swatch.height = 14;
      const context = swatch.getContext("2d");
      context.fillStyle = colour(request);
      context.fillRect(0, 0, 14, 14);
      row.insertCell().append(swatch);
      const name = printable(data.requests[request].id);
      for (const text of [name, number(entry.members.size), number(entry.blocks), number(entry.shared)])
        row.insertCell().textContent = text;
      return row;
    });
    $("holders").tBodies[0].replaceChildren(...rows);
    $("holders").hidden = rows.length === 0;
  };

  const draw = () => {
    readTheme();
    drawOverview();
    drawSteps();
    drawBlocks();
    drawLegend();
    drawSide();
  };

  // ---- input

  let scheduled = false;
  const redraw = () => {
    if (scheduled) return;
    scheduled = true;
    requestAnimationFrame(() => {
      scheduled = false;
      draw();
    });
  };

  const select = (index) => {
    selected = Math.max(0, Math.min(steps.length - 1, index));
    $("slider").value = String(selected);
    $("slider").setAttribute("aria-valuetext", `step ${steps[selected].number}`);
    window.history.replaceState(null, "", `#${steps[selected].number}`);
    redraw();
  };

  const nextEvent = (direction) => {
    let i = selected + direction;
    while (i >= 0 && i < steps.length && !isEventful(steps[i])) i += direction;
    if (i >= 0 && i < steps.length) select(i);
  };

  const keys = {
    ArrowLeft: (event) => select(selected - (event.shiftKey ? 10 : 1)),
    ArrowRight: (event) => select(selected + (event.shiftKey ? 10 : 1)),
    PageUp: () => select(selected - 100), PageDown: () => select(selected + 100),
    Home: () => select(0), End: () => select(steps.length - 1),
    n: () => nextEvent(1), p: () => nextEvent(-1),
    "+": () => { barWidth = Math.min(40, barWidth + 3); redraw(); },
    "-": () => { barWidth = Math.max(3, barWidth - 3); redraw(); },
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key](event);
  });
  $("slider").max = String(steps.length - 1);
  $("slider").addEventListener("input", () => select(Number($("slider").value)));

  const drag = (canvas, stepAt) => {
    const pick = (event) => select(stepAt(event.offsetX, canvas.clientWidth));
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); pick(event); });
    canvas.addEventListener("pointermove", (event) => { if (event.buttons & 1) pick(event); });
  };
  drag($("overview"), (x, width) => Math.floor(x / width * steps.length));
  $("steps").addEventListener("click", (event) =>
    select(firstShown($("steps").clientWidth) + Math.floor(event.offsetX / barWidth)));

  const point = (event) => {
    const column = Math.floor(event.offsetX / map.size), row = Math.floor(event.offsetY / map.size);
    const block = row * map.columns + column;
    if (column >= map.columns || block < 0 || block >= data.usedBlocks || block === hovered) return;
    hovered = block;
    $("block").textContent = blockStory(data, block, history.after(selected)[block]);
  };
  $("blocks").addEventListener("pointermove", point);
  $("blocks").addEventListener("pointerdown", point);
  dark.addEventListener("change", redraw);
  addEventListener("resize", redraw);
  const fromAddress = () => select((Number(location.hash.slice(1)) || steps[0].number) - steps[0].number);
  addEventListener("hashchange", fromAddress);
  fromAddress();
}

start();
