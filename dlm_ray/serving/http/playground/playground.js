"use strict";
// The page asks /v1/models what can be chosen, streams one completion with its canvas, and draws every position as it comes.
const at = (id) => document.getElementById(id);
let models = [];
let model = null;
let running = null;

const headers = () => (at("key").value ? { authorization: `Bearer ${at("key").value}` } : {});

function say(message, isError = false) {
  at("status").textContent = message;
  at("status").className = isError ? "error" : "";
}

async function findModels() {
  const answer = await fetch("v1/models", { headers: headers() });
  const body = await answer.json();
  if (!answer.ok) {
    at("model").textContent = body.error.message;
    return;
  }
  models = body.data;
  at("which").replaceChildren(...models.map((one) => new Option(one.id)));
  at("which-label").hidden = models.length < 2;
  at("key-label").hidden = true;
  choose();
}

function choose() {
  model = models[at("which").selectedIndex];
  at("model").textContent = `${model.id} · ${model.kind} · context of ${model.context_tokens} tokens`;
  at("rule").replaceChildren(new Option("as trained", ""), ...model.rules.map((rule) => new Option(rule, rule)));
  at("block").replaceChildren();
  if (model.whole_canvas) at("block").add(new Option("whole canvas", ""));
  model.block_tokens.forEach((size, place) => at("block").add(new Option(`blocks of ${size}`, place || model.whole_canvas ? size : "")));
  at("infill").hidden = !model.capabilities.infill;
  at("length").max = model.limits.output_tokens;
  at("steps").max = model.limits.steps;
}

function asked() {
  const body = { model: model.id, prompt: at("prompt").value, max_tokens: Number(at("length").value), stream: true };
  body.stream_options = { denoising: true, include_usage: true };
  if (at("suffix").value && !at("infill").hidden) body.suffix = at("suffix").value;
  const numbers = { steps: "steps", temperature: "temperature", seed: "seed", block: "block_tokens" };
  for (const [id, field] of Object.entries(numbers)) if (at(id).value !== "") body[field] = Number(at(id).value);
  if (at("rule").value) body.rule = at("rule").value;
  return body;
}

function span(className, text) {
  const made = document.createElement("span");
  made.className = className;
  made.textContent = text;
  return made;
}

function draw(prompt, suffix, confidence, text, canvas) {
  // What is final in front of the canvas comes as text; its positions keep the colour that they had when they were last seen.
  const parts = [span("given", prompt)];
  if (canvas === null) parts.push(span("token", text));
  else {
    const before = confidence.slice(0, canvas.start);
    parts.push(...before.map(([piece, sure]) => token(piece, sure)));
    canvas.tokens.forEach(([piece, sure], place) => {
      if (piece === null) parts.push(span("mask", ""));
      else {
        confidence[canvas.start + place] = [piece, sure];
        parts.push(token(piece, sure));
      }
    });
  }
  if (suffix) parts.push(span("given", suffix));
  at("canvas").replaceChildren(...parts);
}

function token(piece, sure) {
  const made = span("token", piece);
  made.style.backgroundColor = `hsl(${10 + 130 * sure} 75% 60% / .35)`;
  made.title = `${(100 * sure).toFixed(0)} %`;
  return made;
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const lines = rest.split("\n\n");
    rest = lines.pop();
    for (const line of lines) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
  }
}

async function denoise() {
  if (running || !model) return;
  running = new AbortController();
  at("go").disabled = true;
  at("stop").disabled = false;
  say("denoising …");
  const body = asked();
  const [prompt, suffix, confidence] = [body.prompt, body.suffix || "", []];
  let [text, last, frames] = ["", null, 0];
  try {
    const answer = await fetch("v1/completions", {
      method: "POST", signal: running.signal, body: JSON.stringify(body), headers: { "content-type": "application/json", ...headers() },
    });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const chunk of events(answer.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) text += choice.text;
      if (chunk.dlm_ray && chunk.dlm_ray.canvas) {
        last = chunk.dlm_ray.canvas;
        frames += 1;
        draw(prompt, suffix, confidence, text, last);
      }
      if (chunk.usage) {
        const calls = chunk.usage.network_calls;
        say(`${chunk.usage.completion_tokens} tokens in ${calls.denoising + calls.cache} network calls, seed ${chunk.dlm_ray.seed}`);
      }
    }
    settle(prompt, suffix, confidence, text);
    at("canvas").dataset.done = String(frames);
  } catch (error) {
    say(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    at("go").disabled = false;
    at("stop").disabled = true;
  }
}

function settle(prompt, suffix, confidence, text) {
  // The final text, coloured as far as the positions that were seen spell it.
  const parts = [];
  let rest = text;
  for (const [piece, sure] of confidence.filter(Boolean)) {
    if (!rest.startsWith(piece)) break;
    parts.push(token(piece, sure));
    rest = rest.slice(piece.length);
  }
  const tail = suffix ? [span("given", suffix)] : [];
  at("canvas").replaceChildren(span("given", prompt), ...parts, span("token", rest), ...tail);
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); denoise(); });
at("stop").addEventListener("click", () => running && running.abort());
at("key").addEventListener("change", findModels);
at("which").addEventListener("change", choose);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) denoise();
  if (event.key === "Escape" && running) running.abort();
});
findModels();
