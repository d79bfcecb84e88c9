// The requests in sight, as a table, and what happened to them, as a list.

import { $, duration, make, number, plural, say } from "/page/dom.js";
import { progress } from "/page/machine.js";

const MAX_ROWS = 60, MAX_STORIES = 60;
const ENDINGS = { stop: "came to its end", length: "reached its longest length", abort: "was aborted", error: "failed" };

export class Requests {
  constructor(machine, palette, onlight) {
    this.machine = machine;
    this.palette = palette;
    this.onlight = onlight;
    this.rows = new Map();
    this.body = $("request-rows");
  }

  restyle() {
    for (const row of this.rows.values()) this.palette.swatch(row.swatch, row.look);
  }

  draw() {
    const { machine } = this;
    if (!machine.facts) return;
    const live = [...machine.requests.values()].slice(0, MAX_ROWS), shown = [...live, ...machine.gone];
    for (const [key, row] of this.rows)
      if (!shown.some((request) => request.number === key)) {
        row.element.remove();
        this.rows.delete(key);
      }
    shown.forEach((request, i) => {
      const row = this.rows.get(request.number) ?? this._row(request);
      if (this.body.children[i] !== row.element) this.body.insertBefore(row.element, this.body.children[i] ?? null);
      this._fill(row, request);
    });
    $("no-requests").hidden = shown.length > 0;
    const { waiting, running } = machine.counts, hidden = machine.requests.size - live.length;
    say($("requests-summary"), `${plural(running, "sequence")} running, ${number(waiting)} waiting` +
      (hidden > 0 ? `; ${number(hidden)} more requests` : ""));
  }

  _row(request) {
    const swatch = make("canvas", { "aria-hidden": "true" }), name = make("button", { type: "button" });
    name.append(swatch, `${request.number}`);
    name.setAttribute("aria-label", `Request ${request.number}: show its blocks`);
    name.setAttribute("aria-pressed", "false");
    const cells = Object.fromEntries(["state", "computed", "blocks", "shared"].map((key) => [key, make("td")]));
    const bar = make("i"), text = make("span");
    cells.computed.append(text, make("span", { className: "bar", "aria-hidden": "true" }, bar));
    const element = make("tr", {}, make("td", {}, name), ...Object.values(cells));
    const row = { element, cells, bar, text, swatch, look: request.look, name };
    this.palette.swatch(swatch, request.look);
    element.addEventListener("pointerenter", () => this.onlight(request.number));
    element.addEventListener("pointerleave", () => this.onlight(null));
    name.addEventListener("focus", () => this.onlight(request.number));
    name.addEventListener("blur", () => this.onlight(null));
    this.rows.set(request.number, row);
    return row;
  }

  _fill(row, request) {
    const { computed, known, running, waiting } = progress(request), done = request.reason !== null;
    const many = request.sequences.size > 1 ? ` \u00d7${request.sequences.size}` : "";
    const decoding = request.first !== null;
    say(row.cells.state, done ? (request.reason === "abort" ? "aborted" : "done")
      : running ? (decoding ? "decode" : "prefill") + many : (waiting && decoding ? "preempted" : "waiting") + many);
    say(row.text, `${number(computed)}/${number(known)}`);
    row.bar.style.width = `${known ? (100 * computed) / known : 0}%`;
    const shared = [...request.blocks.values()].filter(Boolean).length;
    say(row.cells.blocks, done ? "\u2013" : number(request.blocks.size));
    say(row.cells.shared, done || !shared ? "\u2013" : number(shared));
    row.element.title = `Request ${request.number}: prompt of ${plural(request.prompt, "token")}` +
      (request.hit ? `, ${number(request.hit)} of them found in the cache` : "") +
      (request.first === null ? "" : `; first token after ${duration(request.first - request.at)}`);
    row.element.classList.toggle("gone", done);
  }
}

export class Story {
  constructor() {
    this.list = $("story");
    this.pending = [];
  }

  see(event, what, machine) {
    const say = (kind, lead, text, at = machine.at) => this.pending.push({ kind, lead, text, at });
    if (event === "request") say("", `Request ${what.number}`, ` arrived with ${plural(what.prompt, "prompt token")}.`);
    if (event === "abort") say("undone", `Request ${what.number}`, " was aborted; its blocks are free.");
    if (event === "paused") say("", what.paused ? "Paused" : "Resumed", ".");
    if (event !== "step") return;
    for (const { number: n, index } of what.preempted)
      say("preempt", "Preempted", `: request ${n}${index ? `.${index}` : ""} gave up its blocks, to be computed again.`);
    for (const { number: n, hit, index } of what.admitted)
      if (hit) say("hit", "Prefix hit", `: request ${n}${index ? `.${index}` : ""} begins with ${plural(hit, "token")} that are computed already.`);
    const limit = 4, cut = (items, tell) => {
      items.slice(0, limit).forEach(tell);
      return items.length - limit;
    };
    const more = cut(what.copies, ([source, target]) =>
      say("copy", "Copy-on-write", `: block ${source} was shared, so its writer got a copy in block ${target}.`));
    if (more > 0) say("copy", "Copy-on-write", `: ${more} more blocks in the same step.`);
    if (what.evicted.length)
      say("evict", "Evicted", `: ${what.evicted.slice(0, 8).join(", ")}${what.evicted.length > 8 ? " and others" : ""}: cached contents gave way.`);
    const forked = new Map();
    for (const { number: n } of what.forks) forked.set(n, (forked.get(n) ?? 0) + 1);
    for (const [n, count] of forked) say("", `Request ${n}`, ` forked into ${plural(count, "more sequence")}, on the same blocks.`);
    const chunk = what.segments.filter((s) => s.prefill && s.count > 1), beside = what.segments.length - chunk.length;
    for (const s of chunk) {
      const end = s.start + s.count, request = machine.requests.get(s.number);
      if (request && end < request.prompt)
        say("", "Chunked prefill", `: request ${s.number}, ${plural(s.count, "token")} up to ${end} of ${request.prompt}` +
          (beside ? `, beside ${plural(beside, "other sequence")}.` : "."));
    }
    for (const { number: n, reason } of what.finished) say("", `Request ${n}`, ` ${ENDINGS[reason] ?? "is done"}.`);
    if (this.pending.length > MAX_STORIES) this.pending.splice(0, this.pending.length - MAX_STORIES);
  }

  draw(machine) {
    for (const { kind, lead, text, at } of this.pending.splice(0)) {
      const seconds = Math.max(0, at).toFixed(1);
      const item = make("li", { className: kind }, make("time", { text: `${seconds} s` }), make("span", {}, make("b", { text: lead }), text));
      this.list.prepend(item);
    }
    while (this.list.children.length > MAX_STORIES) this.list.lastChild.remove();
    if (!this.list.children.length && machine.facts)
      this.list.append(make("li", {}, make("time", { text: "" }), make("span", { text: "Nothing yet." })));
  }
}
