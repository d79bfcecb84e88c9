// The conversation: streams answers, several at once if asked to. A model without a chat template continues texts.

import { events, send } from "/page/api.js";
import { $, make } from "/page/dom.js";

const NUMBERS = { temperature: Number, top_p: Number, seed: (v) => Math.trunc(Number(v)), max_tokens: (v) => Math.trunc(Number(v)) };

export class Chat {
  constructor(machine) {
    this.machine = machine;
    this.turns = []; // {role, content}
    this.running = null; // an AbortController
    this.template = true;
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    $("stop").addEventListener("click", () => this.running?.abort());
    $("clear").addEventListener("click", () => this.clear());
  }

  // What the model can do is known with the first state.
  learn(facts) {
    this.template = facts.chat_template;
    this.model = facts.model;
    $("chat-title").textContent = this.template ? "Chat" : "Continue a text";
    $("prompt").placeholder = this.template ? "Message" : "Once upon a time";
    $("system-field").hidden = !this.template;
    $("max_tokens").max = String(facts.max_sequence_len);
  }

  clear() {
    this.running?.abort();
    this.turns = [];
    $("messages").replaceChildren(this.welcome ?? $("welcome") ?? "");
    this._fail("");
    $("prompt").focus();
  }

  async send() {
    const text = $("prompt").value;
    if (this.running || !text.trim()) return;
    this._fail("");
    this.welcome ??= $("welcome");
    this.welcome?.remove();
    const n = Number($("n").value), body = this._body(text, n);
    if (this.template) {
      this.turns.push({ role: "user", content: text });
      this._append(make("div", { className: "message user" }, make("span", { className: "who", text: "You" }), make("div", { className: "text", text })));
    }
    $("prompt").value = "";
    const answers = this._answers(n, this.template ? "" : text);
    this.running = new AbortController();
    this._busy(true);
    try {
      const path = this.template ? "/v1/chat/completions" : "/v1/completions";
      const response = await send(path, { body, signal: this.running.signal });
      await this._read(response, answers);
    } catch (error) {
      if (error.name !== "AbortError") this._fail(error instanceof TypeError ? "The server cannot be reached." : capital(error.message));
      for (const answer of answers) if (!answer.reason) this._finish(answer, error.name === "AbortError" ? "stopped" : "failed");
    } finally {
      this.running = null;
      this._busy(false);
      for (const answer of answers) if (!answer.reason) this._finish(answer, "stopped");
    }
    if (this.template) this._settle(answers);
  }

  _body(text, n) {
    const body = { model: this.model, stream: true };
    for (const [name, parse] of Object.entries(NUMBERS)) {
      const value = $(name).value.trim();
      if (value !== "" && Number.isFinite(Number(value))) body[name] = parse(value);
    }
    if (n > 1) body.n = n;
    const beams = Number($("beams").value);
    if (beams) {
      body.beams = Math.max(beams, n);
      for (const name of ["temperature", "top_p", "seed"]) delete body[name];
    }
    if (!this.template) return { ...body, prompt: text };
    const system = $("system").value.trim();
    const messages = [...(system ? [{ role: "system", content: system }] : []), ...this.turns, { role: "user", content: text }];
    return { ...body, messages };
  }

  async _read(response, answers) {
    for await (const { data } of events(response)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message ?? "the server failed");
      for (const choice of chunk.choices ?? []) {
        const answer = answers[choice.index];
        if (!answer) continue;
        const piece = choice.delta?.content ?? choice.text ?? "";
        if (piece) this._write(answer, piece);
        if (choice.finish_reason) this._finish(answer, choice.finish_reason);
      }
    }
  }

  // ---- the page

  _append(element) {
    $("messages").append(element);
    $("messages").scrollTop = $("messages").scrollHeight;
  }

  _answers(n, given) {
    const box = make("div", { className: "answers" });
    const answers = Array.from({ length: n }, (_, index) => {
      const output = make("span"), text = make("div", { className: "text" }), footer = make("footer");
      if (given) text.append(make("span", { className: "given", text: given }));
      text.append(output);
      const element = make("div", { className: "answer writing" }, text, footer);
      box.append(element);
      return { index, element, output, footer, content: "", reason: null };
    });
    const who = make("span", { className: "who", text: n > 1 ? `${this.model}, ${n} answers` : this.model });
    this._append(make("div", { className: "message assistant" }, who, box));
    return answers;
  }

  _write(answer, piece) {
    const list = $("messages"), atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
    answer.content += piece;
    answer.output.append(piece);
    if (atEnd) list.scrollTop = list.scrollHeight;
  }

  _finish(answer, reason) {
    answer.reason = reason;
    answer.element.classList.remove("writing");
    if (reason === "length") answer.footer.append("cut off at the longest length");
    else if (reason !== "stop") answer.footer.append(reason);
  }

  // Of several answers one goes on; the first, until another is chosen.
  _settle(answers) {
    const turn = { role: "assistant", content: "" };
    const choose = (chosen) => {
      turn.content = chosen.content;
      for (const answer of answers) {
        answer.element.classList.toggle("chosen", answers.length > 1 && answer === chosen);
        answer.button?.setAttribute("aria-pressed", String(answer === chosen));
      }
    };
    if (answers.length > 1)
      for (const answer of answers) {
        answer.button = make("button", { type: "button", text: "Go on with this one" });
        answer.button.addEventListener("click", () => choose(answer));
        answer.footer.append(answer.button);
      }
    choose(answers.find((answer) => answer.content) ?? answers[0]);
    if (turn.content) this.turns.push(turn);
    else this.turns.pop(); // nothing was answered: the message may be sent again
  }

  _busy(busy) {
    $("send").disabled = busy;
    $("stop").hidden = !busy;
    if (busy) $("chat").setAttribute("aria-busy", "true");
    else $("chat").removeAttribute("aria-busy");
  }

  _fail(message) {
    $("chat-error").textContent = message;
    $("chat-error").hidden = !message;
  }
}

const capital = (text) => (text ? text[0].toUpperCase() + text.slice(1) : text);
