// Throughput and latency over the last seconds.

import { $, duration, median, rate, say, surface } from "/page/dom.js";

const SECONDS = 60, BINS = 60, LEFT = 50, BOTTOM = 16, TOP = 6;
const RECENT = 5; // seconds that "now" means

export class Plots {
  constructor(machine, palette) {
    this.machine = machine;
    this.palette = palette;
  }

  // While the engine is paused or idle the picture need not move.
  get end() {
    return this.machine.paused ? this.machine.at : this.machine.now();
  }

  draw() {
    if (!this.machine.facts) return;
    this._throughput();
    this._latency();
    this._numbers();
  }

  _bins(items, value) {
    const bins = Array.from({ length: BINS }, () => []), begin = this.end - SECONDS;
    for (const item of items) {
      const at = Math.floor(((item.at - begin) / SECONDS) * BINS);
      if (at >= 0 && at < BINS) bins[at].push(value(item));
    }
    return bins;
  }

  _throughput() {
    const each = SECONDS / BINS, sum = (values) => values.reduce((a, b) => a + b, 0) / each;
    const decode = this._bins(this.machine.samples, (s) => s.decode).map(sum);
    const prefill = this._bins(this.machine.samples, (s) => s.prefill).map(sum);
    const frame = new Frame($("throughput"), this.palette, Math.max(10, ...decode, ...prefill), rate);
    frame.line(prefill, this.palette.two, [5, 3]);
    frame.line(decode, this.palette.one);
    const { decodeRate, prefillRate } = this.recent();
    say($("throughput-text"), `now ${rate(decodeRate)} + ${rate(prefillRate)} tokens/s`);
  }

  _latency() {
    const gaps = this._bins(this.machine.gaps, (g) => g.seconds).map(median);
    const firsts = this.machine.firsts.filter((f) => f.at >= this.end - SECONDS);
    const most = Math.max(0.01, ...gaps.filter((v) => v !== null), ...firsts.map((f) => f.seconds));
    const frame = new Frame($("latency"), this.palette, most, duration, true);
    frame.line(gaps, this.palette.one);
    for (const { at, seconds } of firsts) frame.diamond((at - this.end + SECONDS) / SECONDS, seconds, this.palette.two);
    const all = this.machine.gaps.filter((g) => g.at >= this.end - SECONDS).map((g) => g.seconds).sort((a, b) => a - b);
    say($("latency-text"), all.length ? `95% of gaps under ${duration(all[Math.floor(all.length * 0.95)])}` : "");
  }

  recent() {
    const begin = this.end - RECENT, samples = this.machine.samples.filter((s) => s.at >= begin);
    const first = samples[0];
    // from when the first of them began, so that a short burst is not spread over all five seconds
    const span = first ? Math.max(0.05, this.end - Math.max(begin, first.at - first.seconds)) : 1;
    const total = (field) => samples.reduce((sum, s) => sum + s[field], 0) / span;
    return { decodeRate: total("decode"), prefillRate: total("prefill") };
  }

  _numbers() {
    const { machine } = this, { decodeRate, prefillRate } = this.recent();
    say($("stat-decode"), rate(decodeRate));
    say($("stat-prefill"), rate(prefillRate));
    say($("stat-ttft"), duration(median(machine.firsts.slice(-50).map((f) => f.seconds))));
    say($("stat-tbt"), duration(median(machine.gaps.slice(-500).map((g) => g.seconds))));
    const { tokens, prompts } = machine.hits;
    say($("stat-hits"), prompts ? `${Math.round((100 * tokens) / prompts)}%` : "\u2013");
    say($("stat-steps"), machine.numSteps.toLocaleString("en"));
  }
}

// Axes, and marks within them; x from 0 to 1, y from 0 to `most`. In `wide` ones the axis is logarithmic.
class Frame {
  constructor(canvas, palette, most, format, wide = false) {
    this.width = canvas.clientWidth;
    this.height = canvas.clientHeight;
    this.context = surface(canvas, this.width, this.height);
    this.top = wide ? 10 ** Math.ceil(Math.log10(most * 1.05)) : nice(most);
    this.low = wide ? Math.min(0.001, this.top / 1000) : 0;
    this.wide = wide;
    const ticks = wide ? [this.low, this.top] : [0, this.top / 2, this.top];
    if (wide) for (let v = this.low * 10; v < this.top * 0.99; v *= 10) ticks.push(v);
    const { context } = this;
    context.textAlign = "right";
    for (const tick of ticks) {
      const y = Math.round(this.y(tick)) + 0.5;
      context.strokeStyle = palette.line;
      context.beginPath();
      context.moveTo(LEFT, y);
      context.lineTo(this.width, y);
      context.stroke();
      context.fillStyle = palette.soft;
      context.fillText(wide ? short(tick) : format(tick).replace(".0", ""), LEFT - 6, y + 4);
    }
    context.textAlign = "left";
    context.fillText(`${SECONDS} s ago`, LEFT, this.height - 3);
    context.textAlign = "right";
    context.fillText("now", this.width, this.height - 3);
  }

  y(value) {
    const share = this.wide
      ? Math.log(Math.max(this.low, value) / this.low) / Math.log(this.top / this.low)
      : value / this.top;
    return this.height - BOTTOM - Math.min(1, share) * (this.height - BOTTOM - TOP);
  }

  x(share) {
    return LEFT + share * (this.width - LEFT);
  }

  line(values, tone, dash = []) {
    const { context } = this;
    context.strokeStyle = tone;
    context.lineWidth = 2;
    context.lineJoin = "round";
    context.setLineDash(dash);
    context.beginPath();
    let pen = false;
    values.forEach((value, i) => {
      if (value === null) {
        pen = false;
        return;
      }
      const x = this.x((i + 0.5) / values.length), y = this.y(value);
      if (pen) context.lineTo(x, y);
      else {
        context.moveTo(x - 1.5, y);
        context.lineTo(x, y);
      }
      pen = true;
    });
    context.stroke();
    context.setLineDash([]);
  }

  diamond(share, value, tone) {
    const { context } = this, x = this.x(share), y = this.y(value);
    context.fillStyle = tone;
    context.beginPath();
    for (const [dx, dy] of [[0, -4], [4, 0], [0, 4], [-4, 0]]) context.lineTo(x + dx, y + dy);
    context.fill();
  }
}

function nice(most) {
  const power = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((f) => f * power).find((v) => v >= most);
}

function short(seconds) {
  return seconds < 1 ? `${+(seconds * 1000).toPrecision(2)} ms` : `${+seconds.toPrecision(2)} s`;
}
