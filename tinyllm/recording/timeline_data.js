"use strict";
// The data of timeline.py, what each block holds after any step, and what happened, in words. It touches no page.

const KEYFRAME_STEPS = 128;
const KEYFRAME_BLOCKS = 2e7; // over all keyframes: what they take in memory

// One step; its lists are taken apart when they are asked for: a long run has very many.
class Step {
  constructor(raw, index) {
    this.raw = raw;
    this.index = index;
    this.tokens = 0;
    const ran = raw.r || [];
    for (let i = 2; i < ran.length; i += 3) this.tokens += ran[i];
  }

  get number() { return this.raw.n; }
  get at() { return this.raw.t || 0; }
  get free() { return this.raw.s || 0; }
  get waiting() { return this.raw.w || 0; }
  get running() { return this.raw.u || 0; }
  get interrupted() { return this.raw.i === 1; }
  get arrived() { return this.raw.q || []; } // requests
  get aborted() { return this.raw.x || []; }
  get ran() { return triples(this.raw.r); } // [sequence, start, count]
  get admitted() { return pairs(this.raw.a); } // [sequence, hit]
  get preempted() { return this.raw.p || []; } // sequences
  get evicted() { return this.raw.e || []; } // blocks
  get copies() { return pairs(this.raw.c); } // [source, target]
  get forks() { return pairs(this.raw.k); } // [sequence, parent]
  get gained() { return pairs(this.raw.g); } // [sequence, count]
  get finished() { return pairs(this.raw.f); } // [sequence, reason]
  get changes() { return decodeChanges(this.raw.b); } // {block, cached, owners: [[sequence, place], ...]}
}

function decode(data) {
  return { ...data, steps: data.steps.map((raw, i) => new Step(raw, i)), initial: decodeChanges(data.initial) };
}

function isPrefill(data, sequence, start, count) {
  return count > 1 || start + count <= data.requests[data.sequences[sequence][0]].prompt;
}

function pairs(flat = []) {
  const out = [];
  for (let i = 0; i < flat.length; i += 2) out.push([flat[i], flat[i + 1]]);
  return out;
}

function triples(flat = []) {
  const out = [];
  for (let i = 0; i < flat.length; i += 3) out.push([flat[i], flat[i + 1], flat[i + 2]]);
  return out;
}

function decodeChanges(flat = []) {
  const out = [];
  for (let i = 0; i < flat.length;) {
    const [block, cached, count] = [flat[i], flat[i + 1], flat[i + 2]];
    i += 3;
    out.push({ block, cached: cached === 1, owners: pairs(flat.slice(i, i + 2 * count)) });
    i += 2 * count;
  }
  return out;
}

const UNTOUCHED = { cached: false, owners: [] };

// The blocks' states after each step: whole ones at every `spacing`-th step, changes in between.
class BlockHistory {
  constructor(data) {
    this.steps = data.steps;
    this.spacing = Math.max(KEYFRAME_STEPS, Math.ceil(data.steps.length * data.usedBlocks / KEYFRAME_BLOCKS));
    this.state = new Array(data.usedBlocks).fill(UNTOUCHED);
    for (const change of data.initial) this.state[change.block] = change;
    this.before = this.state.slice();
    this.at = -1;
    this.keyframes = [];
    for (let i = 0; i < data.steps.length; i++) {
      this.forward();
      if (i % this.spacing === 0) this.keyframes.push(this.state.slice());
    }
  }

  forward() {
    this.at += 1;
    for (const change of this.steps[this.at].changes) this.state[change.block] = change;
  }

  // The states after step `index`; the array is valid until the next call.
  after(index) {
    if (index < 0) return this.before;
    const nearest = Math.floor(index / this.spacing);
    if (this.at > index || this.at < nearest * this.spacing) {
      this.state = this.keyframes[nearest].slice();
      this.at = nearest * this.spacing;
    }
    while (this.at < index) this.forward();
    return this.state;
  }
}

function isEventful(step) {
  return Boolean(step.raw.p || step.raw.c);
}

// How long a step took: since the one before, or since a request arrived while nothing ran.
function seconds(data, index) {
  const step = data.steps[index], previous = data.steps[index - 1];
  let begin = previous ? previous.at : 0;
  if ((!previous || previous.waiting + previous.running === 0) && step.arrived.length)
    begin = Math.max(begin, data.requests[step.arrived[0]].at);
  return Math.max(0, step.at - begin);
}

// ---- words

function printable(text) {
  const shown = text.length > 60 ? `${text.slice(0, 57)}...` : text;
  return shown.replace(/[\u0000-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g,
    (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
}

const number = (n) => n.toLocaleString("en");
const plural = (n, what) => `${number(n)} ${what}${n === 1 ? "" : "s"}`;
const range = (start, count) =>
  count === 1 ? `token ${number(start)}` : `tokens ${number(start)} to ${number(start + count - 1)}`;

function list(items, limit = 12) {
  const shown = items.slice(0, limit).join(", ");
  return items.length > limit ? `${shown} and ${number(items.length - limit)} more` : shown;
}

function requestName(data, request) {
  return `request ${printable(data.requests[request].id)}`;
}

function sequenceName(data, sequence) {
  const [request, index] = data.sequences[sequence];
  return index > 0 ? `${requestName(data, request)} (sequence ${index})` : requestName(data, request);
}

const ENDINGS = { "": "is done", stop: "came to its end", length: "reached its length limit", error: "failed" };

// What a step did, as [class, sentence] pairs.
function story(data, step) {
  const out = [];
  const say = (sentence, kind = "") => out.push([kind, sentence[0].toUpperCase() + sentence.slice(1)]);
  const sequence = (s) => sequenceName(data, s);
  if (step.interrupted) say("an attempt at this step was interrupted and taken back.", "bad");
  for (const r of step.aborted) say(`${requestName(data, r)} was aborted.`, "bad");
  if (step.arrived.length > 8) say(`${plural(step.arrived.length, "request")} arrived.`);
  else for (const r of step.arrived)
    say(`${requestName(data, r)} arrived, with ${plural(data.requests[r].prompt, "prompt token")}.`);
  for (const s of step.preempted) say(`${sequence(s)} was preempted: it lost its blocks, to be computed again.`, "bad");
  for (const [s, hit] of step.admitted)
    say(`${sequence(s)} began to run` +
      (hit ? `; its first ${plural(hit, "token")} were in memory already.` : "."));
  if (step.evicted.length)
    say(`cached contents were given up, because blocks were needed: ${list(step.evicted)}.`, "warn");
  for (const [source, target] of step.copies)
    say(`block ${source} was copied to block ${target}: others still read it, and it was to be written.`, "copy");
  const gained = new Map(step.gained), decoding = [];
  for (const [s, start, count] of step.ran) {
    if (isPrefill(data, s, start, count)) {
      const prompt = data.requests[data.sequences[s][0]].prompt;
      const again = start + count > prompt && count > 1;
      say(`${sequence(s)}: ${range(start, count)} ${again ? "computed again" : `of ${number(prompt)} prefilled`}` +
        (gained.has(s) ? ", and a first token made." : "."));
    } else decoding.push(s);
  }
  const each = decoding.length > 1 ? "one token each" : "one token";
  if (decoding.length) say(`decoded ${each} for ${list(decoding.map(sequence))}.`);
  for (const [s, parent] of step.forks) say(`${sequence(s)} forked from ${sequence(parent)}: same blocks, no copy.`);
  for (const [s, reason] of step.finished)
    say(`${sequence(s)} ${Object.hasOwn(ENDINGS, reason) ? ENDINGS[reason] : `ended: ${printable(reason)}`}.`);
  return out;
}

function blockStory(data, block, state) {
  const { owners, cached } = state;
  if (!owners.length)
    return `Block ${block} is free` +
      (cached ? ", but what it contains can still be found by a prompt that begins alike." : ".");
  const start = owners[0][1] * data.blockSize, names = owners.map(([sequence]) => sequenceName(data, sequence));
  return `Block ${block} holds ${range(start, data.blockSize)} of ${list(names, 6)}` +
    (owners.length > 1 ? `: shared by ${owners.length}` : "") +
    (cached ? "; it can be found by other prompts (cached)." : ".");
}

if (typeof module !== "undefined") module.exports = { BlockHistory, blockStory, decode, printable, seconds, story };
