// The status page: asks for status.json once a second and shows it. Whatever comes from a job is put in as text.
"use strict";

const POLL_MS = 1000;
const ANSWER_MS = 5000;
// One answer that is late is no news; after this the page says how old its numbers are.
const STALE_MS = 4000;
const MANY_SLOTS = 64;

// Thirteen stages in seven colours, in the order of a job's life; cut and compose are of products.
const GROUPS = [
  ["ledger", "ledger", ["ledger"]],
  ["fetch", "fetch, cut", ["fetch", "cut"]],
  ["wait", "wait for a lane", ["wait"]],
  ["prepare", "adapt, encode", ["adapt", "encode"]],
  ["denoise", "denoise", ["denoise"]],
  ["decode", "decode", ["decode"]],
  ["deliver", "compose, sign, store, record, notify", ["compose", "sign", "store", "record", "notify"]],
];
const GROUP_OF = new Map(GROUPS.flatMap(([group, , stages]) => stages.map((stage) => [stage, group])));

// What the GPU did: its colour, its name in the legend, and the answer while it holds.
const DOINGS = [
  ["denoising", "denoise", "denoising", ""],
  ["no_jobs", "rest", "no jobs", "No job is waiting."],
  ["fetching", "fetch", "fetching", "It waits for adapters and signatures to be fetched."],
  ["encoding", "prepare", "encoding", "It waits for adapters and prompts to be prepared."],
  ["decoding", "decode", "decoding", "Its last lanes are being decoded into pictures."],
  ["engine_starting", "starting", "engine starting", "The engine is starting and loads the model."],
  ["broker_down", "down", "broker down", "The broker is not connected."],
  ["refused", "refused", "refused", "No jobs are taken: a part refuses this worker."],
];

const PHASES = {
  "": "beginning",
  ledger: "asking the ledger",
  fetch: "fetching files",
  cut: "cutting out",
  wait: "waiting for a lane",
  denoise: "denoising",
  decode: "decoding",
  compose: "composing",
  sign: "signing",
  store: "storing",
  record: "recording",
  notify: "telling the backend",
};
const BEHIND_DENOISING = new Set(["decode", "sign", "store", "record", "notify"]);

const $ = (id) => document.getElementById(id);
const rowsOf = new WeakMap();
let answeredAt = null;
let visibleAt = 0;
let isAsking = false;
let timer = 0;

// --- Words and numbers

const whole = new Intl.NumberFormat("en");

function span(seconds) {
  if (seconds < 0.0995) return `${(seconds * 1000).toFixed(0)} ms`;
  if (seconds < 9.995) return `${seconds.toFixed(2)} s`;
  if (seconds < 99.95) return `${seconds.toFixed(1)} s`;
  return long(seconds);
}

function long(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${s % 60} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function ago(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s} s ago`;
  if (s < 3600) return `${Math.floor(s / 60)} min ago`;
  return s < 86400 ? `${Math.floor(s / 3600)} h ago` : `${Math.floor(s / 86400)} d ago`;
}

function bytes(count) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = count;
  let unit = 0;
  while (size >= 999.5 && unit < units.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return `${size < 9.95 && unit > 0 ? size.toFixed(1) : size.toFixed(0)} ${units[unit]}`;
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
const plural = (count, one, many) => `${whole.format(count)} ${count === 1 ? one : many}`;

// --- The document, touched only where something has changed

function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

function attribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

function make(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

/**
 * Make `list`'s children those of `items`: one `{node, update}` a key, kept as long as its key is there.
 *
 * `makeRow` and its `update` are called at different answers, so `update` takes all that changes from its own item.
 */
function keyed(list, items, keyOf, makeRow) {
  const known = rowsOf.get(list) ?? new Map();
  const keys = items.map(keyOf);
  const wanted = new Set(keys);
  for (const [key, row] of known) {
    if (!wanted.has(key)) {
      row.node.remove();
      known.delete(key);
    }
  }
  let place = list.firstElementChild;
  items.forEach((item, index) => {
    const row = known.get(keys[index]) ?? makeRow(item);
    known.set(keys[index], row);
    row.update(item);
    if (row.node === place) place = place.nextElementSibling;
    else list.insertBefore(row.node, place);
  });
  rowsOf.set(list, known);
}

/** Show `[kind, value]` parts as a stacked bar. */
function stack(bar, parts, label) {
  keyed(bar, parts.filter(([, value]) => value > 0), ([kind]) => kind, ([kind]) => {
    const node = make("span", `seg c-${kind}`);
    return { node, update: ([, value]) => node.style.setProperty("flex-grow", String(value)) };
  });
  attribute(bar, "aria-label", label);
}

function progress(bar, share, valueText) {
  const held = Math.min(1, Math.max(0, share));
  bar.firstElementChild.style.setProperty("--share", held.toFixed(4));
  attribute(bar, "aria-valuenow", String(Math.round(100 * held)));
  attribute(bar, "aria-valuetext", valueText);
}

function progressBar() {
  const bar = make("div", "bar", make("div", "fill"));
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-valuemin", "0");
  bar.setAttribute("aria-valuemax", "100");
  return bar;
}

function swatch(kind) {
  return make("i", `swatch c-${kind}`);
}

/** Fill a `dl` with `[term, description]` pairs. */
function facts(list, pairs) {
  const flat = pairs.flatMap(([term, said]) => [["dt", term, term], ["dd", term, said]]);
  keyed(list, flat, ([tag, term]) => `${tag} ${term}`, ([tag]) => {
    const node = make(tag);
    return { node, update: ([, , said]) => text(node, said) };
  });
}

// --- The parts of the page

function showTop(now) {
  const { worker, batch } = now;
  const reason = worker.why_not_ready;
  text($("worker-name"), `${worker.name} · version ${worker.version} · up ${long(worker.uptime_seconds)}`);
  showState(reason ? "not-ready" : "ready", reason ? `not ready: ${reason}` : "ready");
  document.title = reason ? "Not ready · Darkroom" : `${batch.num_lanes} of ${batch.max_lanes} lanes · Darkroom`;
}

function showState(state, said) {
  attribute($("state"), "data-state", state);
  text($("state"), said);
}

function showIdle({ idle, batch }) {
  const doing = DOINGS.find(([name]) => name === idle.reason);
  const lanes = batch.num_lanes ? `${plural(batch.num_lanes, "lane is", "lanes are")} being denoised` : "denoising begins";
  text($("idle-answer"), idle.reason === null ? `It is not: ${lanes}.` : (doing?.[3] ?? `${idle.reason}.`));

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

function showTiles({ batch, queues, webhooks, outcomes, engine_restarts: restarts, model }) {
  const count = (name) => outcomes[name] ?? 0;
  const total = (some) => some.reduce((sum, queue) => sum + queue.num_messages, 0);
  const jobs = queues.filter((queue) => queue.role === "jobs");
  const numRetries = total(queues.filter((queue) => queue.role.startsWith("retry.")));

  $("lanes").replaceChildren(whole.format(batch.num_lanes), make("span", "", ` of ${whole.format(batch.max_lanes)}`));
  const step = model && model.recent_step_seconds > 0 ? `${span(model.recent_step_seconds)} a step` : "";
  text($("lanes-more"), step || "no step measured yet");
  text($("batch"), batch.mean.toFixed(2));
  text($("batch-more"), batch.recent ? `${batch.recent.toFixed(2)} lately` : "no forward lately");
  text($("queue"), jobs.length ? whole.format(total(jobs)) : "–");
  text($("queue-more"), numRetries ? `${plural(numRetries, "waits", "wait")} for another try` : "waiting jobs");
  text($("done"), whole.format(count("complete")));
  text($("done-more"), `${plural(batch.num_steps, "forward", "forwards")}`);
  text($("failed"), whole.format(count("failed")));
  const cancelled = count("cancelled") ? `${whole.format(count("cancelled"))} cancelled, ` : "";
  text($("failed-more"), `${cancelled}${plural(count("retried"), "retry", "retries")}, ${plural(restarts, "restart", "restarts")}`);
  text($("webhooks"), whole.format(webhooks.num_waiting));
  $("webhooks").classList.toggle("is-bad", webhooks.num_waiting > 0);
  text($("webhooks-more"), webhooks.failing.length ? `failing: ${webhooks.failing.join(", ")}` : "all taken");
}

function showJobs({ jobs, batch }) {
  text($("jobs-count"), jobs.length ? `· ${plural(jobs.length, "job", "jobs")}, ${plural(batch.num_lanes, "lane", "lanes")}` : "");
  $("jobs-none").hidden = jobs.length > 0;
  keyed($("jobs"), jobs, (job) => job.task_id, makeJob);
}

function makeJob() {
  const id = make("span", "id");
  const phase = make("span", "phase");
  const times = make("span", "times");
  const bar = progressBar();
  const more = make("p", "job-more");
  const prompt = make("p", "job-more prompt");
  const node = make("li", "", make("div", "job-line", id, phase, times), bar, more, prompt);

  function update(job) {
    const isBehind = BEHIND_DENOISING.has(job.phase);
    const steps = job.num_steps ? `step ${job.step_index} of ${job.num_steps}` : "";
    const phaseText = job.is_cancelled ? "being cancelled" : (PHASES[job.phase] ?? job.phase);
    text(id, `#${job.generation_id}`);
    text(phase, phaseText);
    const left = job.phase === "denoise" && job.seconds_left !== null ? `about ${long(Math.ceil(job.seconds_left))} left` : "";
    text(times, [isBehind ? "" : steps, left, `at work for ${long(job.seconds)}`].filter(Boolean).join(" · "));
    const share = isBehind ? 1 : job.num_steps ? job.step_index / job.num_steps : 0;
    attribute(bar, "aria-label", `Job ${job.generation_id}`);
    progress(bar, share, steps ? `${phaseText}, ${steps}` : phaseText);
    text(more, notes(job).join(" · "));
    text(prompt, job.prompt ?? "");
    showPreview(node, job);
    attribute(node, "data-task", job.task_id);
  }

  return { node, update };
}

/** Show the job's newest preview; its address changes with every step it is of. */
function showPreview(node, job) {
  const known = node.querySelector(".preview");
  if (job.preview === null) {
    known?.remove();
    return;
  }
  const image = known ?? node.insertBefore(make("img", "preview"), node.firstChild);
  attribute(image, "alt", `Preview of job ${job.generation_id}`);
  attribute(image, "src", job.preview);
}

function notes(job) {
  const said = [];
  if (job.num_images > 1) said.push(plural(job.num_images, "picture", "pictures"));
  if (job.attempt > 1) said.push(`attempt ${job.attempt}`);
  if (job.adapters.length) said.push(job.adapters.join(", "));
  return said;
}

function showLast({ at, last_jobs: last }) {
  text($("last-count"), last.length ? `· the newest ${whole.format(last.length)}` : "");
  $("last-none").hidden = last.length > 0;
  $("stage-legend").hidden = last.length === 0;
  keyed($("last"), last.map((job) => ({ ...job, at })), (job) => `${job.task_id} ${job.finished_at}`, makeEnded);
}

function makeEnded(job) {
  const code = make("p", "code");
  const bar = make("div", "stack");
  bar.setAttribute("role", "img");
  const passed = make("span", "ago");
  const pill = make("span", "pill", job.outcome);
  pill.dataset.outcome = job.outcome;
  const row = [pill, make("span", "id", `#${job.generation_id}`), make("div", "what", code, bar), make("span", "took", span(job.seconds)), passed];
  const opened = make("div", "opened");
  const details = make("details", "", make("summary", "", ...row), opened);
  const node = make("li", "", details);
  node.dataset.task = job.task_id;

  text(code, job.code);
  stack(bar, grouped(job.stages), `Stages: ${job.stages.map((stage) => `${stage.name} ${span(stage.seconds)}`).join(", ")}`);
  details.addEventListener("toggle", () => details.open && opened.childElementCount === 0 && opened.append(...insideOf(job)), { once: true });
  return { node, update: ({ at, finished_at: end }) => text(passed, ago(at - end)) };
}

function grouped(stages) {
  const seconds = new Map(GROUPS.map(([group]) => [group, 0]));
  for (const { name, seconds: spent } of stages) {
    const group = GROUP_OF.get(name) ?? "wait";
    seconds.set(group, seconds.get(group) + spent);
  }
  return [...seconds];
}

function insideOf(job) {
  const stages = make("ul", "stages");
  stages.setAttribute("aria-label", "Seconds by stage");
  for (const { name, seconds } of job.stages) {
    stages.append(make("li", "", swatch(GROUP_OF.get(name) ?? "wait"), name, make("b", "", span(seconds))));
  }
  const more = make("dl", "facts");
  const pairs = [
    ["task", job.task_id],
    ["finished", new Date(job.finished_at * 1000).toLocaleString()],
    ["steps", job.num_steps === null ? "–" : String(job.num_steps)],
    ["pictures", job.num_images ? String(job.num_images) : "–"],
    ["attempt", String(job.attempt)],
  ];
  if (job.prompt !== null) pairs.push(["prompt", job.prompt]);
  facts(more, pairs);
  return [make("p", "message", job.message), stages, more];
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
  keyed($("queues"), queues, (queue) => queue.name, () => {
    const name = make("th");
    name.scope = "row";
    const count = make("td", "number");
    const node = make("tr", "", name, count);
    const update = (queue) => {
      text(name, queue.name);
      text(count, whole.format(queue.num_messages));
      const isBad = queue.role === "dead" && queue.num_messages > 0;
      attribute(node, "class", isBad ? "is-bad" : queue.num_messages ? "" : "is-empty");
    };
    return { node, update };
  });
}

function showModel({ model }) {
  $("model-none").hidden = model !== null;
  const pairs = model === null ? [] : [
    ["model", model.model],
    ["family", model.family],
    ["base size", `${model.base_size} px`],
    ["device", `${model.device}, ${model.dtype}`],
    ["loaded in", span(model.load_seconds)],
    ["step alone", span(model.step_seconds)],
  ];
  facts($("model"), pairs);
}

function show(now) {
  for (const part of [showTop, showIdle, showTiles, showJobs, showLast, showSlots, showMemory, showQueues, showModel]) part(now);
}

// --- Asking

async function ask() {
  const answer = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.json();
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden || isAsking) return;
  isAsking = true;
  const now = await ask().catch(() => null); // the page says so itself, by the age of its numbers
  isAsking = false;
  timer = setTimeout(poll, POLL_MS);
  if (now === null) return;
  answeredAt = performance.now();
  show(now);
  showAge();
}

/** Say how old the numbers are, once they are not of now. */
function showAge() {
  if (document.hidden) return;
  const isStale = performance.now() - Math.max(answeredAt ?? 0, visibleAt) > STALE_MS;
  const age = answeredAt === null ? null : (performance.now() - answeredAt) / 1000;
  $("stale").hidden = !isStale;
  $("main").classList.toggle("is-stale", isStale);
  if (isStale) {
    text($("stale"), `The worker cannot be reached.${age === null ? "" : ` These numbers are ${long(age)} old.`}`);
    showState("lost", "not reached");
    document.title = "Not reached · Darkroom";
  }
  if (age !== null) text($("updated"), isStale ? `updated ${ago(age)}` : "updated every second");
}

for (const [group, said] of GROUPS) $("stage-legend").append(make("li", "", swatch(group), said));
document.addEventListener("visibilitychange", () => {
  visibleAt = performance.now();
  poll();
});
setInterval(showAge, 1000);
poll();
