// The status page: asks for status.json once a second and shows it.

import { $, attribute, facts, keyed, make, progress, stack, swatch, text } from "./dom.js";
import { showJobs } from "./jobs.js";
import { ago, bytes, long, percent, plural, span, whole } from "./numbers.js";
import { showTrends } from "./trends.js";
import { describe } from "./words.js";

const POLL_MS = 1000;
const ANSWER_MS = 5000;
// One answer that is late is no news; after this the page says how old its numbers are.
const STALE_MS = 4000;
const MANY_SLOTS = 64;

// What the GPU did: its colour and its name in the legend.
const DOINGS = [
  ["denoising", "denoise", "denoising"],
  ["no_jobs", "rest", "no jobs"],
  ["fetching", "fetch", "fetching"],
  ["encoding", "prepare", "encoding"],
  ["decoding", "decode", "decoding"],
  ["engine_starting", "starting", "engine starting"],
  ["switching_model", "starting", "switching model"],
  ["broker_down", "down", "broker down"],
  ["refused", "refused", "refused"],
];

let answeredAt = null;
let visibleAt = 0;
let isAsking = false;
let isPaused = false;
let timer = 0;

// --- The parts of the page

function showTop({ worker, headline }) {
  const reason = worker.why_not_ready;
  text($("worker-name"), `${worker.name} · version ${worker.version} · up ${long(worker.uptime_seconds)}`);
  showState(reason ? "not-ready" : "ready", reason ? `not ready: ${reason}` : "ready");
  text($("headline"), headline);
  document.title = `${headline} · Darkroom`;
}

function showState(state, said) {
  attribute($("state"), "data-state", state);
  text($("state"), said);
}

function showIdle({ idle }) {
  const seconds = { denoising: idle.denoising_seconds, ...idle.seconds };
  const total = Object.values(seconds).reduce((sum, one) => sum + one, 0) || 1;
  const parts = DOINGS.filter(([name]) => seconds[name] > 0 || name === "denoising")
    .map(([name, kind, said]) => ({ kind, said, spent: seconds[name] ?? 0, share: (seconds[name] ?? 0) / total }));
  const described = parts.map(({ said, share }) => `${said} ${percent(share)}`).join(", ");
  stack($("idle-bar"), parts.map(({ kind, spent }) => [kind, spent]), `Since the start: ${described}`);
  keyed($("idle-legend"), parts, ({ kind }) => kind, makeDoing);
}

function makeDoing({ kind, said }) {
  const shareText = make("b");
  const spentText = make("span");
  const node = make("li", "", swatch(kind), `${said} `, shareText, spentText);
  const update = ({ share, spent }) => {
    text(shareText, percent(share));
    text(spentText, long(spent));
  };
  return { node, update };
}

function showTiles({ batch, webhooks, outcomes, engine_restarts: restarts }) {
  const count = (name) => outcomes[name] ?? 0;
  text($("lanes"), whole.format(batch.num_lanes));
  text($("lanes-of"), ` of ${whole.format(batch.max_lanes)}`);
  text($("lanes-more"), `mean batch ${batch.mean.toFixed(2)}${batch.recent ? `, now ${batch.recent.toFixed(2)}` : ""}`);
  text($("done"), whole.format(count("complete")));
  text($("done-more"), `since the start, ${plural(batch.num_steps, "forward")}`);
  text($("failed"), whole.format(count("failed")));
  const cancelled = count("cancelled") ? `${whole.format(count("cancelled"))} cancelled, ` : "";
  text($("failed-more"), `${cancelled}${whole.format(count("retried"))} retried, ${plural(restarts, "restart")}`);
  text($("webhooks"), whole.format(webhooks.num_waiting));
  $("webhooks").classList.toggle("is-bad", webhooks.num_waiting > 0);
  text($("webhooks-more"), webhooks.failing.length ? `failing: ${webhooks.failing.join(", ")}` : "all taken");
}

function showSlots({ slots }) {
  const squares = ["active", "idle", "free"].flatMap((state) => Array.from({ length: slots[state] }, (_, i) => ({ state, i })));
  squares.forEach((square, index) => (square.index = index));
  keyed($("slots"), squares, ({ index }) => index, () => {
    const node = make("i");
    return { node, update: ({ state }) => attribute(node, "class", `slot-${state}`) };
  });
  $("slots").classList.toggle("is-many", squares.length > MANY_SLOTS);
  attribute($("slots"), "aria-label", `${slots.active} in use, ${slots.idle} loaded, ${slots.free} free`);
  for (const state of ["active", "idle", "free"]) text($(`slots-${state}`), whole.format(slots[state]));
}

function showMemory({ cache, gpu }) {
  meter("cache", cache.size_bytes / cache.max_bytes, `${bytes(cache.size_bytes)} of ${bytes(cache.max_bytes)}`);
  $("gpu").hidden = gpu === null;
  if (gpu !== null) {
    const { memory_used_bytes: used, memory_total_bytes: total, utilization_ratio: busy } = gpu;
    meter("gpu-memory", used / total, `${bytes(used)} of ${bytes(total)}`);
    meter("gpu-busy", busy, percent(busy));
  }
}

function meter(name, share, said) {
  text($(`${name}-text`), said);
  progress($(`${name}-bar`), share, said);
}

function showQueues({ queues }) {
  $("queues-none").hidden = queues.length > 0;
  keyed($("queues"), queues, (queue) => queue.name, (queue) => {
    const word = make("button", "term", queue.name);
    word.type = "button";
    describe(word, queue.role.split(".")[0]);
    const name = make("th", "", word);
    name.scope = "row";
    const count = make("td", "number");
    const node = make("tr", "", name, count);
    const update = ({ role, num_messages: ready }) => {
      text(count, whole.format(ready));
      attribute(node, "class", role === "dead" && ready > 0 ? "is-bad" : ready ? "" : "is-empty");
    };
    return { node, update };
  });
}

function showModel({ model }) {
  $("model-none").hidden = model !== null;
  const pairs = model === null ? [] : [
    ["model", model.model],
    ["family", model.family],
    ["base size", `${model.base_size}\u00a0px`],
    ["device", `${model.device}, ${model.dtype}`],
    ["loaded in", span(model.load_seconds)],
    ["step alone", span(model.step_seconds)],
    ["step lately", model.recent_step_seconds > 0 ? span(model.recent_step_seconds) : "–"],
  ];
  facts($("model"), pairs);
}

function show(now) {
  for (const part of [showTop, showIdle, showTrends, showTiles, showJobs, showSlots, showMemory, showQueues, showModel]) part(now);
}

// --- Asking

async function ask() {
  const answer = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.json();
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden || isAsking || isPaused) return;
  isAsking = true;
  const now = await ask().catch(() => null); // the page says so itself, by the age of its numbers
  isAsking = false;
  timer = setTimeout(poll, POLL_MS);
  if (now === null || isPaused) return;
  answeredAt = performance.now();
  show(now);
  showAge();
}

/** Say how old the numbers are, once they are not of now. */
function showAge() {
  if (document.hidden) return;
  const isStale = !isPaused && performance.now() - Math.max(answeredAt ?? 0, visibleAt) > STALE_MS;
  const age = answeredAt === null ? null : (performance.now() - answeredAt) / 1000;
  $("stale").hidden = !isStale;
  $("main").classList.toggle("is-stale", isStale);
  if (isStale) {
    text($("stale"), `The worker cannot be reached.${age === null ? "" : ` These numbers are ${long(age)} old.`}`);
    showState("lost", "not reached");
    document.title = "Not reached · Darkroom";
  }
  if (age !== null) text($("updated"), isPaused || isStale ? `${isPaused ? "paused, " : ""}updated ${ago(age)}` : "updated every second");
}

$("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  text($("pause"), isPaused ? "Resume" : "Pause");
  visibleAt = performance.now(); // the numbers are old because somebody wanted them to be
  showAge();
  poll();
});
document.addEventListener("visibilitychange", () => {
  visibleAt = performance.now();
  poll();
});
setInterval(showAge, 1000);
poll();
