// Ties the parts together: listens to the engine, and draws what has changed, at most once a frame.

import { events, send } from "/page/api.js";
import { BlockMap } from "/page/block_map.js";
import { Chat } from "/page/chat.js";
import { Controls } from "/page/controls.js";
import { $, say } from "/page/dom.js";
import { exampleLoad } from "/page/example.js";
import { Machine } from "/page/machine.js";
import { Memory } from "/page/memory.js";
import { Palette } from "/page/palette.js";
import { Plots } from "/page/plots.js";
import { Requests, Story } from "/page/requests.js";
import { StepChart } from "/page/step_chart.js";

const RETRY_MS = [500, 1000, 2000, 5000];
const SLOW_MS = 500; // the plots move on though nothing happens

let scheduled = false, drawnAt = 0;
const machine = new Machine();
const palette = new Palette();
const chat = new Chat(machine);
const fail = (message) => chat._fail(message);
const light = (number) => {
  blockMap.light(number);
  steps.lit = number;
  redraw();
};
const blockMap = new BlockMap(machine, palette);
const steps = new StepChart(machine, palette);
const plots = new Plots(machine, palette);
const memory = new Memory(machine);
const requests = new Requests(machine, palette, light);
const story = new Story();
const controls = new Controls(machine, { onerror: fail, onexample: example, ontheme: restyle });
blockMap.onchange = steps.onchange = redraw;

machine.listeners.push((event, what) => {
  if (event === "state") {
    chat.learn(machine.facts);
    say($("model"), machine.facts.model);
    document.title = `${machine.facts.model} \u00b7 tinyllm`;
  }
  blockMap.see(event, what);
  story.see(event, what, machine);
  redraw();
});

// ---- drawing

function redraw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(draw);
}

function draw() {
  scheduled = false;
  drawnAt = performance.now();
  for (const part of [blockMap, steps, plots, memory, requests, controls]) part.draw();
  story.draw(machine);
  if (blockMap.moving) redraw();
}

function restyle() {
  palette.read();
  blockMap.restyle();
  requests.restyle();
  redraw();
}

new ResizeObserver(() => {
  blockMap.restyle();
  redraw();
}).observe($("machine"));
setInterval(() => {
  if (!document.hidden && performance.now() - drawnAt > SLOW_MS) redraw();
}, SLOW_MS);

// ---- the engine

async function listen() {
  for (let failures = 0; ; failures++) {
    try {
      const response = await send("/live/events");
      for await (const { event, data } of events(response)) {
        failures = 0;
        controls.connected = true;
        machine.apply(event, JSON.parse(data));
      }
    } catch (error) {
      if (!(error instanceof TypeError)) console.info(`live events: ${error.message}`);
    }
    controls.connected = false;
    redraw();
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures, RETRY_MS.length - 1)]));
  }
}

async function example() {
  if (!machine.facts || $("example").disabled) return;
  $("example").disabled = true;
  fail("");
  try {
    await exampleLoad(machine.facts);
  } catch (error) {
    fail(`Example load: ${error.message}`);
  } finally {
    $("example").disabled = false;
  }
}

redraw();
listen();
