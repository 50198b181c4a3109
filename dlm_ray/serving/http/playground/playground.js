"use strict";
// Read the models and their capabilities from /v1/models, stream one completion with its canvas, and draw each position.
const element = (id) => document.getElementById(id);
let models = [];
let model = null;
let running = null;

const headers = () => (element("key").value ? { authorization: `Bearer ${element("key").value}` } : {});

function setStatus(message, isError = false) {
  element("status").textContent = message;
  element("status").className = isError ? "error" : "";
}

async function loadModels() {
  const response = await fetch("v1/models", { headers: headers() });
  const body = await response.json();
  if (!response.ok) {
    element("model").textContent = body.error.message;
    return;
  }
  models = body.data;
  element("which").replaceChildren(...models.map((entry) => new Option(entry.id)));
  element("which-label").hidden = models.length < 2;
  element("key-label").hidden = true;
  selectModel();
}

function selectModel() {
  model = models[element("which").selectedIndex];
  element("model").textContent = `${model.id} · ${model.kind} · context of ${model.context_tokens} tokens`;
  element("rule").replaceChildren(new Option("default", ""), ...model.rules.map((rule) => new Option(rule, rule)));
  element("block").replaceChildren();
  if (model.whole_canvas) element("block").add(new Option("whole canvas", ""));
  model.block_tokens.forEach((size, place) => element("block").add(new Option(`blocks of ${size}`, place || model.whole_canvas ? size : "")));
  element("infill").hidden = !model.capabilities.infill;
  element("length").max = model.limits.output_tokens;
  element("steps").max = model.limits.steps;
}

function requestBody() {
  const body = { model: model.id, prompt: element("prompt").value, max_tokens: Number(element("length").value), stream: true };
  body.stream_options = { denoising: true, include_usage: true };
  if (element("suffix").value && !element("infill").hidden) body.suffix = element("suffix").value;
  const numbers = { steps: "steps", temperature: "temperature", seed: "seed", block: "block_tokens" };
  for (const [id, field] of Object.entries(numbers)) if (element(id).value !== "") body[field] = Number(element(id).value);
  if (element("rule").value) body.rule = element("rule").value;
  return body;
}

function span(className, text) {
  const node = document.createElement("span");
  node.className = className;
  node.textContent = text;
  return node;
}

function drawCanvas(prompt, suffix, confidence, text, canvas) {
  // Finished blocks before the canvas keep the colour of the last frame that contained them.
  const parts = [span("given", prompt)];
  if (canvas === null) parts.push(span("token", text));
  else {
    const before = confidence.slice(0, canvas.start);
    parts.push(...before.map(([piece, probability]) => tokenSpan(piece, probability)));
    canvas.tokens.forEach(([piece, probability], place) => {
      if (piece === null) parts.push(span("mask", ""));
      else {
        confidence[canvas.start + place] = [piece, probability];
        parts.push(tokenSpan(piece, probability));
      }
    });
  }
  if (suffix) parts.push(span("given", suffix));
  element("canvas").replaceChildren(...parts);
}

function tokenSpan(piece, probability) {
  const node = span("token", piece);
  node.style.backgroundColor = `hsl(${10 + 130 * probability} 75% 60% / .35)`;
  node.title = `${(100 * probability).toFixed(0)} %`;
  return node;
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
  element("go").disabled = true;
  element("stop").disabled = false;
  setStatus("denoising …");
  const body = requestBody();
  const [prompt, suffix, confidence] = [body.prompt, body.suffix || "", []];
  let [text, last, frames] = ["", null, 0];
  try {
    const response = await fetch("v1/completions", {
      method: "POST", signal: running.signal, body: JSON.stringify(body), headers: { "content-type": "application/json", ...headers() },
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response.body)) {
      if (chunk.error) throw new Error(chunk.error.message);
      for (const choice of chunk.choices) text += choice.text;
      if (chunk.dlm_ray && chunk.dlm_ray.canvas) {
        last = chunk.dlm_ray.canvas;
        frames += 1;
        drawCanvas(prompt, suffix, confidence, text, last);
      }
      if (chunk.usage) {
        const calls = chunk.usage.network_calls;
        setStatus(`${chunk.usage.completion_tokens} tokens in ${calls.denoising + calls.cache} network calls, seed ${chunk.dlm_ray.seed}`);
      }
    }
    drawFinal(prompt, suffix, confidence, text);
    element("canvas").dataset.done = String(frames);
  } catch (error) {
    setStatus(error.name === "AbortError" ? "stopped" : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    element("go").disabled = false;
    element("stop").disabled = true;
  }
}

function drawFinal(prompt, suffix, confidence, text) {
  // Draw the final text; colour it as far as the tokens of the frames spell it.
  const parts = [];
  let rest = text;
  for (const [piece, probability] of confidence.filter(Boolean)) {
    if (!rest.startsWith(piece)) break;
    parts.push(tokenSpan(piece, probability));
    rest = rest.slice(piece.length);
  }
  const tail = suffix ? [span("given", suffix)] : [];
  element("canvas").replaceChildren(span("given", prompt), ...parts, span("token", rest), ...tail);
}

element("form").addEventListener("submit", (event) => { event.preventDefault(); denoise(); });
element("stop").addEventListener("click", () => running && running.abort());
element("key").addEventListener("change", loadModels);
element("which").addEventListener("change", selectModel);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) denoise();
  if (event.key === "Escape" && running) running.abort();
});
loadModels();
