// The page talks to its own server only: POST /infill, or /completion where nothing follows the cursor.
"use strict";

const PAUSE_MS = 350;
const MAX_CHARACTERS = 24000; // of context on either side; the server keeps what is nearest
const $ = (id) => document.getElementById(id);
const code = $("code"), overlay = $("overlay"), tip = $("tip");

// What stands at the cursor in grey: its tokens {text, logprob, top}, how many characters are accepted already, and how
// long the code was then.
let suggestion = null;
let request = null; // AbortController of the one in flight
let timer = 0;
let composing = false;

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 99.95 ? "100%" : share >= 10 ? `${share.toFixed(0)}%` : share >= 0.1 ? `${share.toFixed(1)}%` : "<0.1%";
};
const element = (name, values = {}, ...children) => {
  const made = Object.assign(document.createElement(name), values);
  made.append(...children);
  return made;
};
// Blanks and line breaks as signs, so that a token made of them can be seen.
const visible = (text) => text.replace(/ /g, "·").replace(/\t/g, "→").replace(/\r?\n/g, "⏎") || "∅";
const spoken = (text) => (text.trim() ? text.trim() : text.includes("\n") ? "line break" : text ? "blanks" : "end of text");

function remaining() {
  return suggestion ? suggestion.text.slice(suggestion.taken) : "";
}

function draw() {
  const at = suggestion ? suggestion.at : code.value.length;
  const parts = [code.value.slice(0, at)];
  if (suggestion) {
    let start = 0;
    // Where a character was spread over tokens, they do not spell the text: it is shown in one piece.
    const spelled = suggestion.text.startsWith(suggestion.tokens.map((token) => token.text).join(""));
    for (const [index, token] of spelled ? suggestion.tokens.entries() : []) {
      const text = token.text.slice(Math.max(0, suggestion.taken - start));
      start += token.text.length;
      if (!text) continue;
      const span = element("span", { className: "token", textContent: text });
      span.style.setProperty("--doubt", `${Math.round(26 * (1 - Math.exp(token.logprob)))}%`);
      span.dataset.index = index;
      parts.push(span);
    }
    const rest = suggestion.text.slice(Math.max(start, suggestion.taken));
    if (rest) parts.push(element("span", { className: "token", textContent: rest }));
  }
  // A last line that is empty has no height of its own in a <pre>.
  overlay.replaceChildren(...parts, code.value.slice(at), "\u200b");
  scroll();
}

function scroll() {
  overlay.style.transform = `translate(${-code.scrollLeft}px, ${-code.scrollTop}px)`;
  // The scroll bar takes its room from both, so that lines break alike.
  overlay.style.width = `${code.clientWidth}px`;
}

function say(text, isError = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", isError);
}

function stop() {
  clearTimeout(timer);
  if (request) request.abort();
  request = null;
}

function dismiss() {
  stop();
  if (!suggestion) return false;
  suggestion = null;
  tip.hidden = true;
  draw();
  return true;
}

function showInstead(place, token) {
  const rows = element("div", { className: "rows" });
  const known = new Set();
  for (const each of [token, ...token.top]) {
    if (known.has(each.text)) continue;
    known.add(each.text);
    const bar = element("b");
    bar.style.setProperty("--sure", `${100 * Math.exp(each.logprob)}%`);
    const name = element("code", { textContent: visible(each.text), className: each === token ? "chosen" : "" });
    rows.append(name, bar, element("span", { textContent: percent(each.logprob) }));
  }
  place.replaceChildren(rows);
}

function listTokens() {
  $("instead").replaceChildren();
  $("tokens-hint").hidden = suggestion.tokens.length > 0;
  $("tokens").replaceChildren(...suggestion.tokens.map((token) => {
    const bar = element("i");
    bar.style.setProperty("--sure", `${100 * Math.exp(token.logprob)}%`);
    const button = element("button", { type: "button" },
      visible(token.text), element("small", { textContent: percent(token.logprob) }), bar);
    button.setAttribute("aria-label", `${spoken(token.text)}, ${percent(token.logprob)}`);
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-controls", "instead");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "false";
      for (const other of $("tokens").querySelectorAll("button")) other.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-expanded", String(open));
      if (open) showInstead($("instead"), token); else $("instead").replaceChildren();
    });
    return element("li", {}, button);
  }));
}

// Server-sent events of a response, parsed.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ") && part !== "data: [DONE]") yield JSON.parse(part.slice(6));
    }
  }
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

async function ask() {
  stop();
  dismiss();
  if (code.selectionStart !== code.selectionEnd) return;
  const at = code.selectionStart;
  const before = code.value.slice(Math.max(0, at - MAX_CHARACTERS), at), after = code.value.slice(at, at + MAX_CHARACTERS);
  const fills = after.trim() !== "";
  const body = {
    ...(fills ? { input_prefix: before, input_suffix: after } : { prompt: before }),
    n_predict: Number($("length").value), temperature: Number($("temperature").value),
    top_k: 40, top_p: 0.95, n_probs: 5, stream: true, cache_prompt: true,
  };
  const controller = request = new AbortController();
  const started = performance.now();
  let first = 0;
  say("Thinking…");
  try {
    const response = await fetch(fills ? "infill" : "completion",
      { method: "POST", headers: headers(), body: JSON.stringify(body), signal: controller.signal });
    if (!response.ok) {
      const { error } = await response.json();
      if (response.status === 401) $("key-field").hidden = false;
      throw new Error(error.message);
    }
    suggestion = { at, text: "", taken: 0, tokens: [], length: code.value.length };
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (controller.signal.aborted) return;
      first = first || performance.now() - started;
      suggestion.text += event.content;
      for (const each of event.completion_probabilities || []) {
        const top = (each.top_logprobs || []).map((one) => ({ text: one.token, logprob: one.logprob }));
        suggestion.tokens.push({ text: each.token, logprob: each.logprob, top });
      }
      draw();
      if (event.stop && event.timings) figures(event, first);
    }
    request = null;
    listTokens();
    if (!suggestion.text) {
      say("Nothing to suggest here.");
      suggestion = null;
    } else {
      say("Tab accepts, Esc dismisses.");
      $("announce").textContent = `Suggestion: ${suggestion.text}`;
    }
  } catch (error) {
    if (error.name === "AbortError") return;
    request = null;
    say(error instanceof TypeError ? "The server does not answer." : error.message, true);
  }
}

function figures(event, first) {
  const { timings } = event;
  $("speed").textContent = timings.predicted_per_second ? timings.predicted_per_second.toFixed(0) : "–";
  $("first").textContent = first.toFixed(0);
  $("context").textContent = event.tokens_evaluated.toLocaleString("en");
}

function insert(text) {
  // Through the editing command, so that Ctrl+Z takes it back.
  if (!document.execCommand("insertText", false, text)) {
    code.setRangeText(text, code.selectionStart, code.selectionEnd, "end");
    changed();
  }
}

function accept(text) {
  if (!text) return;
  stop();
  insert(text);
}

function changed() {
  // Typing (or accepting) what is suggested goes on along the suggestion.
  if (suggestion) {
    const added = code.value.length - suggestion.length;
    const typed = code.value.slice(suggestion.at, suggestion.at + added);
    if (added > 0 && code.selectionStart === suggestion.at + added && remaining().startsWith(typed)) {
      suggestion.at += added;
      suggestion.taken += added;
      suggestion.length = code.value.length;
      if (remaining()) {
        draw();
        return;
      }
    }
  }
  dismiss();
  draw();
  if ($("auto").checked && !composing) timer = setTimeout(ask, PAUSE_MS);
}

code.addEventListener("input", changed);
code.addEventListener("scroll", scroll);
code.addEventListener("compositionstart", () => { composing = true; dismiss(); });
code.addEventListener("compositionend", () => { composing = false; changed(); });
code.addEventListener("blur", () => { clearTimeout(timer); });
document.addEventListener("selectionchange", () => {
  if (document.activeElement === code && suggestion && code.selectionStart !== suggestion.at) dismiss();
});
code.addEventListener("keydown", (event) => {
  const text = remaining();
  if (event.key === " " && event.ctrlKey) {
    event.preventDefault();
    ask();
  } else if (event.key === "Tab" && !event.shiftKey && text) {
    event.preventDefault();
    accept(text);
  } else if (event.key === "Escape" && (suggestion || request)) {
    event.preventDefault();
    dismiss();
    say("Dismissed.");
  } else if (event.key === "ArrowRight" && event.altKey && text) {
    event.preventDefault();
    accept(/^\s*(\w+|[^\w\s]+|$)/.exec(text)[0] || text);
  }
});
overlay.addEventListener("mousedown", (event) => {
  if (event.target.className !== "token") return;
  event.preventDefault();
  code.focus();
  accept(remaining());
});
overlay.addEventListener("mousemove", (event) => {
  const token = suggestion && suggestion.tokens[event.target.dataset.index];
  tip.hidden = !token;
  if (!token) return;
  showInstead(tip, token);
  const box = event.target.getBoundingClientRect();
  const left = Math.min(event.clientX, innerWidth - tip.offsetWidth - 12);
  const below = Math.max(box.bottom, event.clientY) + 10;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below + tip.offsetHeight < innerHeight ? below : box.top - tip.offsetHeight - 10}px`;
});
overlay.addEventListener("mouseleave", () => { tip.hidden = true; });
for (const name of ["temperature", "length"]) {
  const show = () => { $(`${name}-value`).textContent = name === "length" ? $(name).value : Number($(name).value).toFixed(1); };
  $(name).addEventListener("input", show);
  show();
}
$("auto").addEventListener("change", () => { if (!$("auto").checked) stop(); });
$("key").addEventListener("change", about);
new ResizeObserver(scroll).observe(code);

async function about() {
  const response = await fetch("v1/models", { headers: headers() });
  if (response.status === 401) {
    $("key-field").hidden = false;
    say("This server asks for a key.", true);
    return;
  }
  const model = (await response.json()).data[0];
  $("name").textContent = model.id;
  document.title = `${model.id} · Smelter`;
  const count = (model.meta || {}).n_params, context = (model.meta || {}).n_ctx_train;
  const size = count >= 1e6 ? `${(count / 1e6).toFixed(count >= 1e7 ? 0 : 1)} million` : count && count.toLocaleString("en");
  $("about").textContent = count ? `${size} parameters, context of ${context.toLocaleString("en")} tokens` : "";
  say("Type, or press Ctrl+Space.");
}

code.value = "def mean(values):\n    total = 0\n    for value in values:\n        total += \n    return total / len(values)\n";
draw();
code.focus();
code.setSelectionRange(code.value.indexOf("+= ") + 3, code.value.indexOf("+= ") + 3);
about().catch(() => say("The server does not answer.", true));
