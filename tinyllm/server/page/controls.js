// The switches: pause, step and resume, the theme, the help, the key, and the keys that reach them.

import { onKeyWanted, send } from "/page/api.js";
import { $, say } from "/page/dom.js";

const THEMES = ["auto", "light", "dark"];

function remembered(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(name, value);
  } catch { /* then it is not */ }
}

export class Controls {
  constructor(machine, { onerror, onexample, ontheme }) {
    this.machine = machine;
    this.connected = false;
    this.onerror = onerror;
    $("pause").addEventListener("click", () => this._switch("pause"));
    $("step").addEventListener("click", () => this._switch("step"));
    $("resume").addEventListener("click", () => this._switch("resume"));
    $("example").addEventListener("click", onexample);
    $("help-open").addEventListener("click", () => $("help").showModal());
    this._theme(ontheme);
    this._shortcuts();
    onKeyWanted(askForKey);
  }

  draw() {
    const { machine, connected } = this;
    const status = !connected ? (machine.facts ? "disconnected" : "connecting") : machine.paused ? "paused"
      : machine.idle ? "idle" : "running";
    if ($("status").dataset.status !== status) {
      $("status").dataset.status = status;
      say($("status"), status);
    }
    $("pause").disabled = !connected || machine.paused;
    const lost = document.activeElement;
    $("step").disabled = $("resume").disabled = !connected || !machine.paused;
    if (lost === $("pause") && $("pause").disabled && connected) $("step").focus(); // focus does not fall off the page
    if ((lost === $("resume") || lost === $("step")) && $("resume").disabled && connected) $("pause").focus();
  }

  async _switch(name) {
    try {
      await send(`/live/${name}`, { body: {} });
      this.onerror("");
    } catch (error) {
      this.onerror(`${name}: ${error.message}`);
    }
  }

  _theme(ontheme) {
    const show = (theme) => {
      if (theme === "auto") delete document.documentElement.dataset.theme;
      else document.documentElement.dataset.theme = theme;
      $("theme").textContent = `Theme: ${theme}`;
      ontheme();
    };
    let theme = THEMES.includes(remembered("tinyllm-theme")) ? remembered("tinyllm-theme") : "auto";
    show(theme);
    $("theme").addEventListener("click", () => {
      theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
      remember("tinyllm-theme", theme);
      show(theme);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", ontheme);
  }

  _shortcuts() {
    const keys = {
      p: () => $("pause").click(), s: () => $("step").click(), r: () => $("resume").click(), e: () => $("example").click(),
      "?": () => $("help-open").click(), "/": () => $("prompt").focus(),
    };
    $("shortcuts").checked = remembered("tinyllm-shortcuts") !== "off";
    $("shortcuts").addEventListener("change", () => remember("tinyllm-shortcuts", $("shortcuts").checked ? "on" : "off"));
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey || !$("shortcuts").checked || !Object.hasOwn(keys, event.key)) return;
      if (event.target.closest?.("input, textarea, select, dialog")) return;
      event.preventDefault();
      keys[event.key]();
    });
  }
}

function askForKey(refused) {
  const dialog = $("key-dialog");
  say($("key-title"), refused ? "This key was refused" : "This server asks for a key");
  $("key").value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const given = () => {
      if (!$("key").value) {
        dialog.showModal();
        return;
      }
      dialog.removeEventListener("close", given);
      resolve($("key").value);
    };
    dialog.addEventListener("close", given);
  });
}
