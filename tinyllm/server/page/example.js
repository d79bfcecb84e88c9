// A load that shows sharing, copy-on-write and chunked prefill at once: requests that begin alike, one that forks, and a
// long prompt that arrives while they decode.

import { send } from "/page/api.js";

const OPENING = "Once upon a time there was a king who had three sons, and the youngest of them was called Simpleton. " +
  "The two elder brothers were proud and clever, but the youngest spoke little and was kind to every creature in the " +
  "wood. One day the king grew old and weak, and he did not know which of his sons should have the kingdom after him. " +
  "So he called them before the castle and said: Go forth, and he who brings me the most beautiful carpet shall be king " +
  "when I am dead.";
const TAILS = [
  " The eldest son rode to the east, and", " The second son rode to the west, and",
  " Simpleton stood alone and sad, when suddenly", " But the old queen heard this, and she said:",
];

export async function exampleLoad(facts, { signal } = {}) {
  const room = facts.max_sequence_len, tokens = Math.max(8, Math.min(120, Math.floor(room / 6)));
  // a salt of its own, so that nothing is in the cache yet when it is run again
  const common = { model: facts.model, temperature: 0.9, ignore_eos: true, cache_salt: `example ${Math.random()}` };
  // of words of about two tokens each at most, so that it fits with what is generated
  const words = OPENING.split(" "), fits = Math.max(4, Math.floor((room - tokens) / 4));
  const opening = words.slice(0, Math.min(words.length, fits)).join(" ");
  const long = Array.from({ length: 40 }, () => words).flat().slice(0, Math.min(900, Math.floor((room - tokens) / 2))).join(" ");
  const post = (body) => send("/v1/completions", { body: { ...common, ...body }, signal });
  const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const first = post({ prompt: TAILS.map((tail) => opening + tail), max_tokens: tokens, seed: 1 });
  await wait(250);
  // two prompts, so that at least one ends within a block, which its answers then copy
  const ends = [" And so it came to pass that", " And so it came to pass that one"].map((end) => opening + end);
  const forked = post({ prompt: ends, n: 2, max_tokens: Math.floor(tokens * 0.8), seed: 2 });
  await wait(350);
  const prefilled = post({ prompt: `The long road. ${long}`, max_tokens: Math.floor(tokens / 2), seed: 3 });
  const results = await Promise.allSettled([first, forked, prefilled]);
  const failed = results.find((result) => result.status === "rejected");
  if (failed) throw failed.reason;
  await Promise.all(results.map((result) => result.value.json()));
}
