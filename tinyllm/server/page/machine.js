// What is known of the engine: a state message with the events after it applied. It touches no page.
// See tinyllm/server/live/messages.py for the messages.

const KEPT_STEPS = 160;
const KEPT_SECONDS = 125;
const KEPT_SAMPLES = 20000;
const KEPT_GONE = 4; // requests that have ended, in the table
const FREE = { cached: false, owners: [] };

export class Machine {
  constructor() {
    this.facts = null;
    this.listeners = [];
    this.clear();
  }

  clear() {
    this.blocks = [];
    this.requests = new Map(); // by number
    this.gone = [];
    this.steps = [];
    this.samples = []; // {at, seconds, decode, prefill}
    this.firsts = []; // {at, seconds, request}
    this.gaps = []; // {at, seconds}
    this.counts = { free: 0, waiting: 0, running: 0 };
    this.cached = 0;
    this.shared = 0;
    this.held = 0;
    this.hits = { tokens: 0, prompts: 0 };
    this.at = 0;
    this.numSteps = 0;
    this.paused = false;
  }

  // Tells every listener (kind, what) after the picture has changed.
  apply(event, data) {
    if (event !== "state" && this.facts === null) return;
    const result = this[`_${event}`]?.(data);
    if (data.free !== undefined) this.counts = { free: data.free, waiting: data.waiting, running: data.running };
    if (data.at !== undefined) {
      this.at = data.at;
      this.seenAt = performance.now();
    }
    this._trim();
    for (const listener of this.listeners) listener(event, result ?? data);
  }

  get idle() {
    return this.counts.waiting + this.counts.running === 0;
  }

  // Seconds, by the server's clock. It stands while nothing is heard of an engine that is paused.
  now() {
    return this.at + (performance.now() - (this.seenAt ?? performance.now())) / 1000;
  }

  get num_cached_free() {
    return this.cached - this.heldCached;
  }

  // ---- events

  _state(data) {
    const again = this.facts !== null && data.at >= this.at && data.num_blocks === this.facts.num_blocks;
    const { steps, samples, firsts, gaps, hits, requests } = this;
    this.clear();
    if (again) Object.assign(this, { steps, samples, firsts, gaps, hits });
    this.facts = data;
    this.paused = data.paused;
    this.numSteps = data.steps;
    this.blocks = new Array(data.num_blocks).fill(FREE);
    this.heldCached = 0;
    for (const item of data.requests) {
      const request = this._add(item, requests.get(item.request));
      request.first = item.first;
      request.sequences = new Map(item.sequences.map(([index, status, computed, known]) =>
        [index, { index, status, computed, known, lastAt: null }]));
    }
    for (const change of data.blocks) this._change(change);
  }

  _request(data) {
    const request = this._add(data);
    request.sequences.set(0, { index: 0, status: "waiting", computed: 0, known: data.prompt, lastAt: null });
    return request;
  }

  _paused(data) {
    this.paused = data.paused;
  }

  _abort(data) {
    const changes = data.blocks.map((change) => this._change(change));
    const request = this.requests.get(data.abort);
    if (request) this._end(request, "abort");
    return { request, number: data.abort, changes };
  }

  _step(data) {
    this.numSteps = data.step;
    const step = {
      number: data.step, at: data.at, seconds: data.seconds, tokens: 0, decode: 0, prefill: 0, segments: [],
      preempted: [], admitted: [], hits: [], copies: data.copies ?? [], evicted: data.evicted ?? [], forks: [],
      finished: [], changes: [], waiting: data.waiting, running: data.running,
    };
    for (const [number, index] of data.preempted ?? []) {
      const sequence = this._sequence(number, index);
      if (sequence) Object.assign(sequence, { status: "waiting", computed: 0 });
      step.preempted.push({ number, index });
    }
    for (const [number, index, hit] of data.admitted ?? []) {
      const sequence = this._sequence(number, index), request = this.requests.get(number);
      if (sequence) Object.assign(sequence, { status: "running", computed: hit });
      step.admitted.push({ number, index, hit });
      if (hit) step.hits.push({ number, index, hit });
      if (request && index === 0 && request.hit === null) {
        request.hit = hit;
        this.hits.tokens += hit;
        this.hits.prompts += request.prompt;
      }
    }
    for (const [number, index, start, count] of data.ran ?? []) {
      const sequence = this._sequence(number, index), request = this.requests.get(number);
      if (sequence) Object.assign(sequence, { status: "running", computed: start + count });
      const prefill = count > 1 || (request !== undefined && start + count <= request.prompt);
      step.segments.push({ number, index, start, count, prefill, look: request?.look ?? 0 });
      step.tokens += count;
      step[prefill ? "prefill" : "decode"] += count;
    }
    for (const [number, index, parent] of data.forks ?? []) {
      const from = this._sequence(number, parent), request = this.requests.get(number);
      if (request && from) request.sequences.set(index, { ...from, index });
      step.forks.push({ number, index, parent });
    }
    for (const [number, index, position, count] of data.tokens ?? [])
      this._gain(number, index, position + count, data.at);
    for (const change of data.blocks ?? []) step.changes.push(this._change(change));
    for (const [number, index, reason] of data.finished ?? []) {
      const request = this.requests.get(number), sequence = request?.sequences.get(index);
      if (sequence) sequence.status = "finished";
      if (request && [...request.sequences.values()].every((s) => s.status === "finished")) {
        this._end(request, reason);
        step.finished.push({ number, reason });
      }
    }
    this.steps.push(step);
    this.samples.push({ at: data.at, seconds: data.seconds, decode: step.decode, prefill: step.prefill });
    return step;
  }

  // ---- parts

  _add({ request: number, at, prompt, max_tokens, task }, before) {
    const request = {
      number, at, prompt, maxTokens: max_tokens, task, first: null, hit: before?.hit ?? null, look: before?.look ?? this._look(),
      sequences: new Map(), blocks: new Map(), shared: 0, reason: null,
    };
    this.requests.set(number, request);
    return request;
  }

  // The lowest look (see palette.js) that no request in sight has.
  _look() {
    const taken = new Set([...this.requests.values(), ...this.gone].map((request) => request.look));
    let look = 0;
    while (taken.has(look)) look++;
    return look;
  }

  _sequence(number, index) {
    return this.requests.get(number)?.sequences.get(index);
  }

  _gain(number, index, known, at) {
    const request = this.requests.get(number);
    if (!request) return;
    let sequence = request.sequences.get(index);
    if (!sequence) {
      sequence = { index, status: "running", computed: 0, known, lastAt: null };
      request.sequences.set(index, sequence);
    }
    if (request.first === null) {
      request.first = at;
      this.firsts.push({ at, seconds: at - request.at, number });
    }
    if (sequence.lastAt !== null && known > sequence.known)
      this.gaps.push({ at, seconds: (at - sequence.lastAt) / (known - sequence.known) });
    sequence.lastAt = at;
    sequence.known = known;
  }

  _change([block, cached, owners]) {
    const before = this.blocks[block], after = owners.length || cached ? { cached, owners } : FREE;
    this.blocks[block] = after;
    this.cached += cached - before.cached;
    this.held += (owners.length > 0) - (before.owners.length > 0);
    this.shared += (owners.length > 1) - (before.owners.length > 1);
    this.heldCached += (owners.length > 0 && cached) - (before.owners.length > 0 && before.cached);
    for (const [state, sign] of [[before, -1], [after, 1]]) {
      for (const number of new Set(state.owners.map((owner) => owner[0]))) {
        const request = this.requests.get(number);
        if (!request) continue;
        if (sign > 0) request.blocks.set(block, state.owners.length > 1);
        else request.blocks.delete(block);
      }
    }
    return { block, before, after };
  }

  _end(request, reason) {
    this.requests.delete(request.number);
    request.reason = reason ?? "done";
    request.sequences = new Map(request.sequences);
    this.gone.unshift(request);
    this.gone.length = Math.min(this.gone.length, KEPT_GONE);
  }

  _trim() {
    if (this.steps.length > 2 * KEPT_STEPS) this.steps.splice(0, this.steps.length - KEPT_STEPS);
    for (const items of [this.samples, this.firsts, this.gaps]) {
      if (items.length < 64) continue;
      let old = Math.max(0, items.length - KEPT_SAMPLES);
      while (old < items.length && items[old].at < this.at - KEPT_SECONDS) old++;
      if (old > items.length / 4 || items.length > KEPT_SAMPLES) items.splice(0, old);
    }
  }

  // How many of a block's slots hold tokens that are computed: the most that any of its owners has.
  filled(block) {
    const size = this.facts.block_size;
    let most = 0;
    for (const [number, index, place] of this.blocks[block].owners) {
      const sequence = this._sequence(number, index);
      const computed = sequence && sequence.status !== "finished" ? sequence.computed : Infinity;
      most = Math.max(most, Math.min(size, computed - place * size));
    }
    return most;
  }
}

export function progress(request) {
  let computed = 0, known = 0, running = 0, waiting = 0;
  for (const sequence of request.sequences.values()) {
    computed += Math.min(sequence.computed, sequence.known);
    known += sequence.known;
    running += sequence.status === "running";
    waiting += sequence.status === "waiting";
  }
  return { computed, known, running, waiting };
}
