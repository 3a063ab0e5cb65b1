// The chat. One conversation, kept in the page alone.
import { ApiError, events, getJson, setKey } from "./api.js";
import { render } from "./markdown.js";
import { tokenView } from "./tokens.js";
import { watch } from "./view.js";

const $ = (id) => document.getElementById(id);
const messages = []; // as the API takes them, without the system prompt
let running = null; // AbortController of the answer under way
let model = null;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function button(text, action) {
  const node = element("button", "small", text);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

function addCard(who) {
  const card = element("article", `message ${who}`);
  card.setAttribute("aria-label", who === "user" ? "You" : "The model");
  const head = element("div", "who");
  head.append(element("span", "", who === "user" ? "You" : who === "tool" ? "Tool result" : model || "Model"));
  const body = element("div", "body");
  card.append(head, body);
  $("log").append(card);
  card.head = head;
  card.body = body;
  return card;
}

const atEnd = () => $("log").scrollHeight - $("log").scrollTop - $("log").clientHeight < 60;
const toEnd = () => { $("log").scrollTop = $("log").scrollHeight; };

// -- settings -----------------------------------------------------------------------------------------------------
class FieldError extends Error {
  constructor(id, message) {
    super(message);
    this.id = id;
  }
}

function json(id, what, test) {
  const text = $(id).value.trim();
  if (!text) return undefined;
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new FieldError(id, `${what} is not JSON: ${error.message}`);
  }
  if (!test(value)) throw new FieldError(id, `${what} has the wrong form`);
  return value;
}

function payload() {
  const system = $("system").value.trim();
  const body = {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const id of NUMBERS) {
    const input = $(id);
    if (!input.checkValidity()) throw new FieldError(id, `${id}: ${input.validationMessage}`);
    if (input.value !== "") body[id] = Number(input.value);
  }
  if ($("logprobs").checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  const schema = json("schema", "The JSON schema", (v) => v !== null && typeof v === "object" && !Array.isArray(v));
  if (schema) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema } };
  const tools = json("tools", "The list of tools", (v) => Array.isArray(v));
  if (tools?.length) body.tools = tools;
  return body;
}

function showField(id) {
  for (const node of document.querySelectorAll("[aria-invalid]")) node.removeAttribute("aria-invalid");
  if (!id || !$(id)) return;
  $("settings").open = true;
  $(id).setAttribute("aria-invalid", "true");
  $(id).focus();
}

// Boxes by the parameter they fill in, and which box a refused parameter was filled in.
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "max_tokens", "seed"];
const BOXES = { response_format: "schema", tools: "tools", tool_choice: "tools", top_logprobs: "logprobs", logprobs: "logprobs",
  ...Object.fromEntries(NUMBERS.map((id) => [id, id])) };

// -- an answer ----------------------------------------------------------------------------------------------------
class Answer {
  constructor() {
    this.card = addCard("assistant");
    this.text = "";
    this.tokens = [];
    this.calls = [];
    this.finish = null;
    this.began = performance.now();
    this.first = null;
    this.usage = null;
    this.pending = false;
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { delta } = choice;
    if (choice.logprobs?.content) this.tokens.push(...choice.logprobs.content);
    if (delta.content) this.text += delta.content;
    for (const call of delta.tool_calls || []) {
      const known = (this.calls[call.index] ??= { id: "", type: "function", function: { name: "", arguments: "" } });
      if (call.id) known.id = call.id;
      known.function.name += call.function?.name || "";
      known.function.arguments += call.function?.arguments || "";
    }
    if ((delta.content || delta.tool_calls) && this.first === null) this.first = performance.now();
    if (choice.finish_reason) this.finish = choice.finish_reason;
    this.paint();
  }

  paint() { // at most once a frame
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      const follow = atEnd();
      this.card.body.replaceChildren(render(this.text), ...this.calls.filter(Boolean).map((call) => this.callCard(call)));
      if (follow) toEnd();
    });
  }

  callCard(call) {
    const box = element("div", "tool");
    box.append(element("strong", "", `calls ${call.function.name}`));
    box.append(element("pre", "", call.function.arguments));
    return box;
  }

  end(error) {
    const message = { role: "assistant", content: this.text };
    if (this.calls.length) message.tool_calls = this.calls.filter(Boolean);
    if (this.text || this.calls.length) messages.push(message);
    const seconds = (performance.now() - (this.first ?? this.began)) / 1000;
    const facts = [];
    if (this.usage) {
      const out = this.usage.completion_tokens;
      facts.push(`${this.usage.prompt_tokens} + ${out} tokens`);
      if (this.first !== null) facts.push(`first after ${Math.round(this.first - this.began)} ms`);
      if (out > 1 && seconds > 0) facts.push(`${((out - 1) / seconds).toFixed(1)} tokens/s`);
    }
    if (this.finish && this.finish !== "stop") facts.push(`ended by ${this.finish}`);
    if (facts.length) this.card.head.append(element("span", "", facts.join(" · ")));
    if (this.text) {
      this.card.head.append(button("Copy", () => navigator.clipboard?.writeText(this.text)));
    }
    if (this.tokens.length) this.card.head.append(this.tokenButton());
    if (error) {
      const box = element("div", "error", error);
      box.setAttribute("role", "alert");
      this.card.append(box);
    }
    if (this.finish === "tool_calls") this.card.append(resultForm(message.tool_calls));
  }

  tokenButton() {
    let view = null;
    const toggle = button("Token probabilities", () => {
      if (view) {
        view.remove();
        view = null;
      } else {
        view = tokenView(this.tokens);
        this.card.append(view);
      }
      this.card.body.hidden = view !== null && this.calls.length === 0;
      toggle.setAttribute("aria-pressed", String(view !== null));
    });
    toggle.setAttribute("aria-pressed", "false");
    return toggle;
  }
}

// What the tools answered is for the person to say: the page runs none.
function resultForm(calls) {
  const form = element("form", "tool");
  const boxes = calls.map((call) => {
    const label = element("label", "", `Result of ${call.function.name}`);
    const box = element("textarea");
    box.rows = 1;
    label.append(box);
    form.append(label);
    return box;
  });
  const send = element("button", "", "Send results");
  send.type = "submit";
  form.append(send);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running) return;
    calls.forEach((call, i) => {
      messages.push({ role: "tool", tool_call_id: call.id, content: boxes[i].value });
      addCard("tool").body.append(element("div", "plain", boxes[i].value));
    });
    form.remove();
    answer();
  });
  return form;
}

async function answer() {
  let body;
  try {
    body = payload();
  } catch (error) {
    if (!(error instanceof FieldError)) throw error;
    showField(error.id);
    const box = element("div", "error", error.message);
    box.setAttribute("role", "alert");
    $("log").append(box);
    toEnd();
    buttons();
    return;
  }
  showField(null);
  const view = new Answer();
  const controller = (running = new AbortController());
  buttons();
  toEnd();
  let failure = null;
  try {
    for await (const chunk of events("v1/chat/completions", { body, signal: controller.signal, end: true })) view.take(chunk);
  } catch (error) {
    if (error.name === "AbortError") view.finish = "you";
    else if (error instanceof ApiError) {
      failure = error.param && BOXES[error.param.split(/[.[]/)[0]] ? `The server refused this: ${error.message}` : error.message;
      if (error.param) showField(BOXES[error.param.split(/[.[]/)[0]]);
    } else throw error;
  } finally {
    running = running === controller ? null : running;
    if (view.card.isConnected) view.end(failure);
    buttons();
    toEnd();
  }
}

// -- the form -----------------------------------------------------------------------------------------------------
function buttons() {
  $("stop").disabled = !running;
  $("send").disabled = Boolean(running);
  $("retry").disabled = Boolean(running) || !messages.some((message) => message.role === "user");
}

function submit() {
  const text = $("prompt").value.trim();
  if (!text || running) return;
  $("prompt").value = "";
  messages.push({ role: "user", content: text });
  addCard("user").body.append(element("div", "plain", text));
  answer();
}

// Takes back all after the last message of the person and asks again.
function retry() {
  if (running) return;
  while (messages.length && messages.at(-1).role !== "user") messages.pop();
  if (!messages.length) return;
  while ($("log").lastElementChild && !$("log").lastElementChild.classList.contains("user")) $("log").lastElementChild.remove();
  answer();
}

function reset() {
  running?.abort();
  messages.length = 0;
  $("log").replaceChildren();
  buttons();
  $("prompt").focus();
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
$("stop").addEventListener("click", () => running?.abort());
$("retry").addEventListener("click", retry);
$("reset").addEventListener("click", reset);
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value);
  $("key").value = "";
  $("prompt").focus();
  begin();
});

// Of several models one is talked to and watched; the conversation goes on when another is chosen.
function choose(names) {
  if (!names.includes(model)) model = names[0];
  const several = names.length > 1, list = $("models");
  $("choice").hidden = !several;
  $("model").hidden = several;
  $("model").textContent = model;
  document.title = `${model} · Quire`;
  if (several && [...list.options].map((one) => one.value).join() !== names.join()) {
    list.replaceChildren(...names.map((name) => new Option(name, name)));
  }
  list.value = model;
}

$("models").addEventListener("change", () => {
  model = $("models").value;
  begin();
});

let connecting = null;

async function begin() {
  connecting?.abort();
  const { signal } = (connecting = new AbortController());
  for (;;) {
    try {
      const cards = (await getJson("v1/models")).data;
      choose([...new Set(cards.map((card) => card.root))]); // aliases are other names of the same
      $("key-form").hidden = true;
      await watch(signal, model);
    } catch (error) {
      if (signal.aborted) return;
      $("state").textContent = error.status === 401 ? "needs a key" : "no answer";
      $("state").classList.add("bad");
      $("engine-error").textContent = error.message;
      $("engine-error").hidden = false;
      if (error.status === 401) {
        $("model").textContent = "";
        $("key-form").hidden = false;
        $("key").focus();
        return;
      }
    }
    await new Promise((resolve) => setTimeout(resolve, 2000));
    if (signal.aborted) return;
  }
}

buttons();
begin();
