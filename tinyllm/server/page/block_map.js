// The block map: one cell a block. The base canvas has the blocks; the overlay what moves: the cursor, copies, evictions.

import { $, calm, make, plural, say, surface } from "/page/dom.js";

const SIZES = [26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 7];
const MAX_HEIGHT = 236; // CSS pixels, unless the smallest cells need more
const FLASH_MS = 900;
const MAX_FLASHES = 80;
const MAX_SHOWN = 100000; // a canvas has an end
const HINT = "Point at a block, or move with the arrow keys (n: the next one in use). A block fills from below.";
const MAX_LISTED = 200;

export class BlockMap {
  constructor(machine, palette) {
    this.machine = machine;
    this.palette = palette;
    this.cursor = -1;
    this.lit = null; // the request whose blocks stand out
    this.dirty = new Set();
    this.all = true;
    this.flashes = [];
    this.map = $("block-map");
    this.base = $("block-base");
    this.overlay = $("block-overlay");
    this.onchange = () => {};
    this._listen();
  }

  // ---- what happened

  see(event, result) {
    if (event === "state") {
      this.all = true;
      this.flashes = [];
    }
    const changes = result.changes ?? [];
    for (const change of changes) this.dirty.add(change.block);
    if (event !== "step") return;
    const fresh = performance.now();
    if (calm.matches) this.flashes = [];
    for (const [source, target] of result.copies) this.flashes.push({ kind: "copy", source, block: target, fresh });
    for (const block of result.evicted) this.flashes.push({ kind: "evict", block, fresh });
    for (const { number, index } of result.segments) {
      const sequence = this.machine.requests.get(number)?.sequences.get(index);
      if (sequence) this._touch(number, index, sequence);
    }
    if (this.flashes.length > MAX_FLASHES) this.flashes.splice(0, this.flashes.length - MAX_FLASHES);
  }

  // Blocks of which a slot was filled, without changing hands.
  _touch(number, index, sequence) {
    const request = this.machine.requests.get(number), size = this.machine.facts.block_size;
    const place = Math.floor((sequence.computed - 1) / size);
    for (const block of request.blocks.keys())
      if (this.machine.blocks[block].owners.some((o) => o[0] === number && o[1] === index && o[2] >= place - 1))
        this.dirty.add(block);
  }

  light(number) {
    if (this.lit === number) return;
    this.lit = number;
    this.all = true;
    this.onchange();
  }

  restyle() {
    this.all = true;
  }

  // ---- drawing

  get moving() {
    return this.flashes.length > 0 && !calm.matches;
  }

  layout() {
    const count = Math.min(this.machine.blocks.length, MAX_SHOWN), width = this.map.clientWidth;
    const fits = (size) => Math.ceil(count / Math.max(1, Math.floor(width / size))) * size <= MAX_HEIGHT;
    this.size = SIZES.find(fits) ?? SIZES.at(-1);
    this.columns = Math.max(1, Math.floor(width / this.size));
    this.count = count;
    this.width = this.columns * this.size;
    this.height = Math.ceil(count / this.columns) * this.size;
    for (const canvas of [this.base, this.overlay]) {
      canvas.style.width = `${this.width}px`;
      canvas.style.height = `${this.height}px`;
    }
  }

  draw() {
    if (!this.machine.facts) return;
    if (this.all) {
      this.layout();
      const context = surface(this.base, this.width, this.height);
      for (let block = 0; block < this.count; block++) this._drawBlock(context, block);
    } else if (this.dirty.size) {
      const context = this.base.getContext("2d");
      for (const block of this.dirty) if (block < this.count) this._drawBlock(context, block);
    }
    this.all = false;
    this.dirty.clear();
    this._drawOverlay();
    this._tell();
  }

  _place(block) {
    return [(block % this.columns) * this.size, Math.floor(block / this.columns) * this.size];
  }

  _drawBlock(context, block) {
    const { palette, machine, size } = this, [x, y] = this._place(block), state = machine.blocks[block];
    const gap = size > 9 ? 2 : 1, inner = size - gap, radius = size > 11 ? 3 : 1;
    context.globalAlpha = 1;
    context.clearRect(x, y, size, size);
    const cell = (style, fill) => {
      context.beginPath();
      context.roundRect(x + (fill ? 0 : 0.5), y + (fill ? 0 : 0.5), inner - (fill ? 0 : 1), inner - (fill ? 0 : 1), radius);
      if (fill) context.fillStyle = style;
      else context.strokeStyle = style;
      if (fill) context.fill();
      else context.stroke();
    };
    context.lineWidth = 1;
    if (!state.owners.length) {
      cell(state.cached ? palette.edge : palette.line, false);
      if (state.cached) {
        context.fillStyle = palette.edge;
        context.beginPath();
        context.arc(x + inner / 2, y + inner / 2, Math.max(1.3, size / 8), 0, 7);
        context.fill();
      }
      return;
    }
    const numbers = [...new Set(state.owners.map((owner) => owner[0]))];
    if (this.lit !== null && !numbers.includes(this.lit)) context.globalAlpha = 0.22;
    const shown = numbers.slice(0, 4), level = Math.min(1, Math.max(0.08, machine.filled(block) / machine.facts.block_size));
    context.save();
    context.beginPath();
    context.roundRect(x, y, inner, inner, radius);
    context.clip();
    shown.forEach((number, i) => {
      const look = this._look(number), left = x + (i * inner) / shown.length, wide = inner / shown.length;
      context.fillStyle = palette.tint(look);
      context.fillRect(left, y, wide + 0.5, inner);
      context.fillStyle = palette.fill(context, look);
      context.fillRect(left, y + inner * (1 - level), wide + 0.5, inner * level);
    });
    if (state.cached) { // a corner is cut off
      const cut = Math.max(3, size / 4);
      context.fillStyle = palette.surface;
      context.beginPath();
      context.moveTo(x + inner - cut, y);
      context.lineTo(x + inner, y);
      context.lineTo(x + inner, y + cut);
      context.fill();
    }
    context.restore();
    if (size >= 16) this._label(context, x, y, inner, state.owners.length > 1 ? null : numbers[0], shown, level);
    if (state.owners.length > 1) this._badge(context, x, y, inner, state.owners.length);
    context.globalAlpha = 1;
  }

  _label(context, x, y, inner, number, shown, level) {
    if (number === null) return;
    const look = this._look(number);
    if (level > 0.45 && this.palette.textured(look)) { // figures are read on a plain ground
      context.fillStyle = this.palette.hue(look);
      const wide = number % 100 > 9 ? inner * 0.68 : inner * 0.44;
      context.fillRect(x + (inner - wide) / 2, y + inner * 0.24, wide, inner * 0.52);
    }
    context.fillStyle = level > 0.45 ? this.palette.on(this._look(shown[0])) : this.palette.ink;
    context.font = `600 ${Math.min(10, inner * 0.46)}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.fillText(String(number % 100), x + inner / 2, y + inner / 2 + 3.6);
  }

  // How many tables name the block.
  _badge(context, x, y, inner, count) {
    context.fillStyle = this.palette.ink;
    if (inner < 14) {
      context.fillRect(x + inner / 2 - 1.5, y + inner / 2 - 1.5, 3, 3);
      return;
    }
    context.beginPath();
    context.arc(x + inner / 2, y + inner / 2, Math.min(7, inner * 0.34), 0, 7);
    context.fill();
    context.fillStyle = this.palette.surface;
    context.font = `700 ${Math.min(10, inner * 0.45)}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.fillText(count > 9 ? "+" : String(count), x + inner / 2, y + inner / 2 + 3.5);
  }

  _look(number) {
    return (this.machine.requests.get(number) ?? this.machine.gone.find((r) => r.number === number))?.look ?? 0;
  }

  _drawOverlay() {
    const { palette, size } = this, context = surface(this.overlay, this.width, this.height), now = performance.now();
    this.flashes = this.flashes.filter((flash) => calm.matches || now - flash.fresh < FLASH_MS);
    for (const flash of this.flashes) {
      if (flash.block >= this.count) continue;
      const [x, y] = this._place(flash.block), inner = size - (size > 9 ? 2 : 1);
      context.globalAlpha = calm.matches ? 1 : 1 - ((now - flash.fresh) / FLASH_MS) ** 2;
      context.strokeStyle = flash.kind === "copy" ? palette.copy : palette.warn;
      context.lineWidth = 2.5;
      context.setLineDash(flash.kind === "copy" ? [] : [4, 3]);
      context.strokeRect(x + 1, y + 1, inner - 2, inner - 2);
      context.setLineDash([]);
      if (flash.kind === "copy" && flash.source < this.count) this._arrow(context, this._place(flash.source), [x, y]);
    }
    context.globalAlpha = 1;
    if (this.cursor >= 0 && this.cursor < this.count) {
      const [x, y] = this._place(this.cursor), inner = size - (size > 9 ? 2 : 1);
      context.lineWidth = 2;
      context.strokeStyle = palette.ink;
      context.strokeRect(x - 0.5, y - 0.5, inner + 1, inner + 1);
    }
  }

  _arrow(context, from, to) {
    const half = this.size / 2, [x1, y1, x2, y2] = [from[0] + half, from[1] + half, to[0] + half, to[1] + half];
    const bend = Math.min(40, Math.hypot(x2 - x1, y2 - y1) / 3), middle = [(x1 + x2) / 2, (y1 + y2) / 2 - bend];
    context.lineWidth = 2;
    context.beginPath();
    context.moveTo(x1, y1);
    context.quadraticCurveTo(...middle, x2, y2);
    context.stroke();
    const angle = Math.atan2(y2 - middle[1], x2 - middle[0]);
    context.fillStyle = context.strokeStyle;
    context.beginPath();
    context.moveTo(x2, y2);
    for (const side of [-0.5, 0.5]) context.lineTo(x2 - 8 * Math.cos(angle + side), y2 - 8 * Math.sin(angle + side));
    context.fill();
  }

  // ---- words

  _tell() {
    const { machine } = this, { held, shared, cached } = machine, total = machine.blocks.length;
    const cachedFree = machine.num_cached_free;
    say($("blocks-summary"), `${held} held (${shared} shared), ${total - held} free (${cachedFree} findable), ` +
      `${plural(total, "block")} of ${machine.facts.block_size} tokens`);
    const summary = $("blocks-summary").dataset;
    Object.assign(summary, { held, shared, cached, total, cachedFree });
    say($("block-detail"), this.cursor < 0 ? HINT : this.describe(this.cursor));
    const list = $("block-list");
    if (list.parentElement.open) this._list(list);
  }

  describe(block) {
    const { machine } = this, { owners, cached } = machine.blocks[block], size = machine.facts.block_size;
    if (!owners.length)
      return `Block ${block} is free${cached ? ", but a prompt that begins like what it holds can still find it" : ""}.`;
    const names = owners.slice(0, 6).map(([number, index, place]) =>
      `request ${number}${index ? `.${index}` : ""} at place ${place}`);
    const more = owners.length > 6 ? ` and ${owners.length - 6} more` : "";
    const place = owners[0][2], filled = machine.filled(block);
    return `Block ${block} holds tokens ${place * size} to ${place * size + Math.max(1, filled) - 1}: ${names.join(", ")}${more}` +
      `${owners.length > 1 ? `; shared by ${owners.length}` : ""}${cached ? "; cached" : ""}.`;
  }

  _list(list) {
    const items = [];
    for (let block = 0; block < this.machine.blocks.length && items.length < MAX_LISTED; block++)
      if (this.machine.blocks[block].owners.length) items.push(this.describe(block));
    if (this.machine.held > items.length) items.push(`and ${this.machine.held - items.length} more held blocks`);
    if (!items.length) items.push("No block is held.");
    while (list.children.length > items.length) list.lastChild.remove();
    items.forEach((text, i) => {
      if (!list.children[i]) list.append(make("li"));
      say(list.children[i], text);
    });
  }

  // ---- input

  _listen() {
    const point = (event) => {
      if (!this.size) return;
      const box = this.base.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / this.size), row = Math.floor((event.clientY - box.top) / this.size);
      const block = row * this.columns + column;
      this._move(column >= 0 && column < this.columns && block >= 0 && block < this.count ? block : -1);
    };
    this.map.addEventListener("pointermove", point);
    this.map.addEventListener("pointerdown", point);
    this.map.addEventListener("pointerleave", () => { if (document.activeElement !== this.map) this._move(-1); });
    this.map.addEventListener("focus", () => { if (this.cursor < 0 && this.map.matches(":focus-visible")) this._move(0); });
    this.map.addEventListener("blur", () => this._move(-1));
    this.map.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey || !this.size) return;
      const at = Math.max(0, this.cursor), last = this.count - 1;
      const moves = {
        ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + this.columns, ArrowUp: at - this.columns,
        Home: 0, End: last, n: this._nextHeld(at),
      };
      if (!Object.hasOwn(moves, event.key)) return;
      event.preventDefault();
      event.stopPropagation();
      if (moves[event.key] >= 0 && moves[event.key] <= last) this._move(moves[event.key], true);
    });
    $("block-list").parentElement.addEventListener("toggle", () => this.onchange());
  }

  _nextHeld(from) {
    for (let i = 1; i <= this.count; i++) {
      const block = (from + i) % this.count;
      if (this.machine.blocks[block].owners.length) return block;
    }
    return from;
  }

  _move(block, scroll = false) {
    if (this.cursor === block) return;
    this.cursor = block;
    if (scroll && block >= 0) {
      const [, y] = this._place(block), top = this.map.scrollTop, high = this.map.clientHeight;
      if (y < top) this.map.scrollTop = y;
      else if (y + this.size > top + high) this.map.scrollTop = y + this.size - high;
    }
    this.onchange();
  }
}
