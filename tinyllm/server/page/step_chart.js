// The last steps as stacked bars within the budget, and under each what else happened in it.

import { $, duration, number, plural, say, surface } from "/page/dom.js";

const BAR = 9, LEFT = 74, TOP = 8, LANE = 12;
const LANES = [
  ["admitted", "admitted", "ink", "up"], ["hits", "prefix hit", "good", "disc"], ["forks", "forked", "ink", "fork"],
  ["copies", "copied", "copy", "square"], ["evicted", "evicted", "warn", "dashed"], ["preempted", "preempted", "bad", "down"],
];

export class StepChart {
  constructor(machine, palette) {
    this.machine = machine;
    this.palette = palette;
    this.canvas = $("steps");
    this.chosen = null; // a step's number
    this.lit = null;
    this.onchange = () => {};
    this._listen();
  }

  get shown() {
    return this.machine.steps.slice(-Math.max(1, Math.floor((this.canvas.clientWidth - LEFT) / BAR)));
  }

  draw() {
    if (!this.machine.facts) return;
    const { palette, canvas, machine } = this, width = canvas.clientWidth, height = canvas.clientHeight;
    const context = surface(canvas, width, height), steps = this.shown, budget = machine.facts.max_batch_tokens;
    const bottom = height - LANES.length * LANE - 6, tall = bottom - TOP;
    const scale = (tokens) => (Math.log2(1 + Math.min(tokens, budget)) / Math.log2(1 + budget)) * tall;
    // the axis is logarithmic, so that single tokens are seen beside whole chunks
    context.textAlign = "right";
    for (const tokens of new Set([budget, Math.round(budget / 8), Math.round(budget / 64), 0])) {
      const y = Math.round(bottom - scale(tokens)) + 0.5;
      context.strokeStyle = tokens === budget ? palette.edge : palette.line;
      context.setLineDash(tokens === budget ? [5, 4] : []);
      context.lineWidth = 1;
      context.beginPath();
      context.moveTo(LEFT, y);
      context.lineTo(width, y);
      context.stroke();
      context.fillStyle = palette.soft;
      context.fillText(number(tokens), LEFT - 8, y + 4);
    }
    context.setLineDash([]);
    LANES.forEach(([, name], lane) => {
      context.fillStyle = palette.soft;
      context.fillText(name, LEFT - 8, bottom + 6 + lane * LANE + 9);
    });
    steps.forEach((step, i) => this._drawStep(context, step, LEFT + i * BAR, bottom, scale));
    this._tell(steps);
  }

  _drawStep(context, step, x, bottom, scale) {
    const { palette } = this, wide = BAR - 2;
    if (step.number === this.chosen) {
      context.fillStyle = palette.line;
      context.fillRect(x - 1, 0, BAR, this.canvas.clientHeight);
    }
    const tall = scale(step.tokens), least = Math.min(2, tall / Math.max(1, step.segments.length));
    const rest = tall - least * step.segments.length;
    let y = bottom;
    for (const { number: request, count, prefill, look } of step.segments) {
      const high = least + (rest * count) / step.tokens, gap = high > 4 ? 1 : 0;
      context.globalAlpha = this.lit !== null && this.lit !== request ? 0.22 : 1;
      context.fillStyle = prefill ? palette.tint(look) : palette.fill(context, look);
      context.fillRect(x, y - high, wide, Math.max(0.6, high - gap));
      if (prefill && high > 3) {
        context.strokeStyle = palette.hue(look);
        context.lineWidth = 1.5;
        context.strokeRect(x + 0.75, y - high + 0.75, wide - 1.5, high - gap - 1.5);
      }
      y -= high;
    }
    context.globalAlpha = 1;
    LANES.forEach(([field, , tone, shape], lane) => {
      if (step[field].length) mark(context, shape, x + wide / 2, bottom + 6 + lane * LANE + 5.5, palette[tone], palette.surface);
    });
  }

  _tell(steps) {
    const last = steps.at(-1);
    say($("steps-summary"), last ? `the last ${steps.length}, each at most ${plural(this.machine.facts.max_batch_tokens, "token")}` : "");
    const step = steps.find((s) => s.number === this.chosen) ?? last;
    const text = step ? describe(step) : "No step has run yet.";
    $("steps-detail").setAttribute("aria-live", this.chosen === null ? "off" : "polite");
    say($("steps-detail"), text);
    this.canvas.setAttribute("aria-label", "Tokens of each request in the last steps; arrow keys choose a step");
  }

  _listen() {
    const { canvas } = this;
    const choose = (at) => {
      const step = this.shown[at];
      this.chosen = step ? step.number : null;
      this.onchange();
    };
    canvas.addEventListener("pointermove", (event) => choose(Math.floor((event.offsetX - LEFT) / BAR)));
    canvas.addEventListener("pointerleave", () => choose(-1));
    canvas.addEventListener("blur", () => choose(-1));
    canvas.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey) return;
      const steps = this.shown, found = steps.findIndex((s) => s.number === this.chosen);
      const at = found < 0 ? steps.length : found;
      const moves = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 };
      if (!Object.hasOwn(moves, event.key)) return;
      event.preventDefault();
      choose(Math.max(0, Math.min(steps.length - 1, moves[event.key])));
    });
  }
}

function mark(context, shape, x, y, tone, paper) {
  context.fillStyle = context.strokeStyle = tone;
  context.lineWidth = 1.5;
  context.beginPath();
  if (shape === "up" || shape === "down") {
    const sign = shape === "up" ? -1 : 1;
    context.moveTo(x, y + sign * 4);
    context.lineTo(x - 3.5, y - sign * 3);
    context.lineTo(x + 3.5, y - sign * 3);
    context.fill();
  } else if (shape === "disc") {
    context.arc(x, y, 3.4, 0, 7);
    context.fill();
  } else if (shape === "square") {
    context.fillRect(x - 3, y - 3, 6, 6);
  } else if (shape === "dashed") {
    context.fillStyle = paper;
    context.rect(x - 2.5, y - 2.5, 5, 5);
    context.stroke();
  } else {
    context.moveTo(x, y + 4);
    context.lineTo(x, y);
    context.lineTo(x - 3, y - 3.5);
    context.moveTo(x, y);
    context.lineTo(x + 3, y - 3.5);
    context.stroke();
  }
}

function describe(step) {
  const groups = new Map();
  for (const { number: request, count, prefill } of step.segments) {
    const entry = groups.get(request) ?? { prefill: 0, decode: 0 };
    entry[prefill ? "prefill" : "decode"] += count;
    groups.set(request, entry);
  }
  const parts = [...groups].map(([request, { prefill, decode }]) =>
    `request ${request}: ${[prefill && `${prefill} prefilled`, decode && `${decode} decoded`].filter(Boolean).join(", ")}`);
  const shown = parts.slice(0, 8).join("; "), more = parts.length > 8 ? `; and ${parts.length - 8} more requests` : "";
  return `Step ${number(step.number)}, ${plural(step.tokens, "token")} in ${duration(step.seconds)}. ` +
    `${shown ? shown[0].toUpperCase() + shown.slice(1) : ""}${more}.`;
}
