// Where the memory goes, as a pie, and what of the KV cache is in use.

import { $, bytes, make, say } from "/page/dom.js";

const SVG = "http://www.w3.org/2000/svg";

export class Memory {
  constructor(machine) {
    this.machine = machine;
    this.built = null;
  }

  draw() {
    const { facts } = this.machine;
    if (!facts) return;
    if (this.built !== facts) this._build(facts);
    const used = (this.machine.held / Math.max(1, facts.num_blocks)) * facts.kv_cache_nbytes;
    const cached = (this.machine.num_cached_free / Math.max(1, facts.num_blocks)) * facts.kv_cache_nbytes;
    const percent = (100 * this.machine.held) / Math.max(1, facts.num_blocks);
    if (used === this.used && cached === this.cachedBytes) return;
    this.used = used;
    this.cachedBytes = cached;
    const at = (nbytes) => this.kvFrom + (this.kvTo - this.kvFrom) * (nbytes / facts.kv_cache_nbytes);
    this.inner.setAttribute("d", arc(60, 60, 33, 39, at(0), at(used)));
    this.findable.setAttribute("d", arc(60, 60, 33, 39, at(used), at(used + cached)));
    say(this.usedText, bytes(used));
    say(this.cachedText, bytes(cached));
    say(this.percentText, `${percent < 10 ? percent.toFixed(1) : Math.round(percent)}%`);
    say($("memory-text"), `Weights ${bytes(facts.weights_nbytes)}, KV cache ${bytes(facts.kv_cache_nbytes)}, ` +
      `${bytes(used)} of it held and ${bytes(cached)} cached; workspace ${bytes(facts.workspace_nbytes + facts.scratch_nbytes)}.`);
  }

  _build(facts) {
    this.built = facts;
    this.used = null;
    const parts = [
      ["Weights", facts.weights_nbytes], ["KV cache", facts.kv_cache_nbytes],
      ["Workspace", facts.workspace_nbytes + facts.scratch_nbytes],
    ];
    const total = parts.reduce((sum, [, n]) => sum + n, 0);
    const pie = $("pie"), legend = $("memory-legend");
    pie.replaceChildren();
    legend.replaceChildren();
    const item = (name, text, className) => {
      const value = make("span", { text });
      legend.append(make("li", { className }, make("i"), make("span", { text: name }), value));
      return value;
    };
    let from = 0;
    parts.forEach(([name, nbytes], i) => {
      const to = from + nbytes / total, path = document.createElementNS(SVG, "path");
      path.setAttribute("d", arc(60, 60, 41, 58, from, to));
      path.setAttribute("class", `slice-${i + 1}`);
      pie.append(path);
      item(name, bytes(nbytes), `slice-${i + 1}`);
      if (i === 1) {
        [this.kvFrom, this.kvTo] = [from, to];
        this.usedText = item("held", "", "within slice-4");
        this.cachedText = item("cached", "", "within slice-5");
      }
      from = to;
    });
    [this.inner, this.findable] = ["slice-4", "slice-5"].map((className) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", className);
      pie.append(path);
      return path;
    });
    const text = (y, content, className) => {
      const element = document.createElementNS(SVG, "text");
      element.setAttribute("x", "60");
      element.setAttribute("y", y);
      if (className) element.setAttribute("class", className);
      element.textContent = content;
      pie.append(element);
      return element;
    };
    this.percentText = text("62", "");
    text("74", "of KV held", "small");
    say($("memory-total"), `${bytes(total)} in all`);
  }
}

// A ring's sector, from and to as shares of the whole turn.
function arc(x, y, inner, outer, from, to) {
  const sweep = Math.min(to - from, 0.9999);
  if (sweep <= 0) return "";
  const at = (radius, share) => {
    const angle = (share - 0.25) * 2 * Math.PI;
    return `${(x + radius * Math.cos(angle)).toFixed(3)} ${(y + radius * Math.sin(angle)).toFixed(3)}`;
  };
  const large = sweep > 0.5 ? 1 : 0, end = from + sweep;
  return `M${at(outer, from)}A${outer} ${outer} 0 ${large} 1 ${at(outer, end)}L${at(inner, end)}` +
    `A${inner} ${inner} 0 ${large} 0 ${at(inner, from)}Z`;
}
