// The jobs at work and the last ones that ended, both filtered by generation.

import { $, attribute, facts, keyed, make, progress, progressBar, stack, swatch, text } from "./dom.js";
import { ago, long, plural, rough, span, whole } from "./numbers.js";

const NUM_LAST = 10; // the newest, unless all are wanted

// Thirteen stages in seven colours, in the order of a job's life; cut and compose are of products.
const GROUPS = [
  ["ledger", "ledger", ["ledger"]],
  ["fetch", "fetch, cut", ["fetch", "cut"]],
  ["wait", "wait", ["wait"]],
  ["prepare", "adapt, encode", ["adapt", "encode"]],
  ["denoise", "denoise", ["denoise"]],
  ["decode", "decode", ["decode"]],
  ["deliver", "compose, sign, store, record, notify", ["compose", "sign", "store", "record", "notify"]],
];
const GROUP_OF = new Map(GROUPS.flatMap(([group, , stages]) => stages.map((stage) => [stage, group])));

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

let wanted = "";
let showsAll = false;
let shown = null;

for (const [group, said] of GROUPS) $("stage-legend").append(make("li", "", swatch(group), said));

export function showJobs(now) {
  shown = now;
  const { at, jobs, last_jobs: last, batch } = now;
  const matching = (all) => all.filter((job) => job.generation_id.toLowerCase().includes(wanted) || job.task_id === wanted);
  const running = matching(jobs);
  const ended = matching(last);

  text($("jobs-count"), jobs.length ? `· ${count(running, jobs, "job")}, ${plural(batch.num_lanes, "lane")}` : "");
  text($("jobs-none"), jobs.length ? "None at work matches." : "No job is at work.");
  $("jobs-none").hidden = running.length > 0;
  keyed($("jobs"), running, (job) => job.task_id, makeJob);

  text($("last-count"), last.length ? `· ${wanted ? count(ended, last, "job") : `the newest ${whole.format(last.length)}`}` : "");
  text($("last-none"), last.length ? "None of the last jobs matches." : "No job has ended since the start.");
  $("last-none").hidden = ended.length > 0;
  $("stages").hidden = last.length === 0;
  const isCut = !showsAll && !wanted && ended.length > NUM_LAST;
  $("last-all").hidden = !isCut;
  text($("last-all"), `Show all ${whole.format(ended.length)}`);
  $("last").classList.toggle("with-images", last.some((job) => job.thumbnail !== null));
  const rows = isCut ? ended.slice(0, NUM_LAST) : ended;
  keyed($("last"), rows.map((job) => ({ ...job, at })), (job) => `${job.task_id} ${job.finished_at}`, makeEnded);

  text($("filter-result"), wanted ? `${whole.format(running.length + ended.length)} found` : "");
}

const count = (some, all, noun) => (some.length === all.length ? plural(all.length, noun) : `${whole.format(some.length)} of ${plural(all.length, noun)}`);

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
  if (job.num_images > 1) said.push(plural(job.num_images, "image"));
  if (job.attempt > 1) said.push(`attempt ${job.attempt}`);
  if (job.adapters.length) said.push(job.adapters.join(", "));
  return said;
}

function makeEnded(job) {
  const code = make("p", "code", job.code);
  const bar = make("div", "stack");
  bar.setAttribute("role", "img");
  stack(bar, grouped(job.stages), `Stages: ${job.stages.map((stage) => `${stage.name} ${span(stage.seconds)}`).join(", ")}`);
  const passed = make("span", "ago");
  const pill = make("span", "pill", job.outcome);
  pill.dataset.outcome = job.outcome;
  const row = [pill, make("span", "id", `#${job.generation_id}`), make("div", "what", code, bar), make("span", "took", span(job.seconds)), passed];
  const opened = make("div", "opened");
  const details = make("details", "", make("summary", "", ...row), opened);
  const links = job.result_urls.map((url, index) => resultLink(url, job.result_urls.length > 1 ? `image ${index + 1}` : "the image"));
  const thumbnail = job.thumbnail === null ? null : makeThumbnail(job, links[0]);
  const node = make("li", "", ...(thumbnail ? [thumbnail.node] : []), details);
  node.dataset.task = job.task_id;

  details.addEventListener("toggle", () => details.open && opened.append(...insideOf(job, links)), { once: true });
  const update = ({ at, finished_at: end }) => {
    text(passed, ago(at - end));
    for (const part of thumbnail ? [...links, thumbnail] : links) part.update(at);
  };
  return { node, update };
}

/** The small image of a job, as a link to the image itself where that can be opened. */
function makeThumbnail(job, link) {
  const image = make("img");
  image.src = job.thumbnail;
  image.alt = `Image of job ${job.generation_id}`;
  image.loading = "lazy";
  const node = make("a", "thumbnail", image);
  return { node, update: (at) => link && openWith(node, link.address(at)) };
}

/** The address of a result as the backend got it: a link while it can be opened, else text that says why not. */
function resultLink(url, said) {
  const anchor = make("a", "", said);
  const note = make("span", "muted");
  const isWeb = /^https?:\/\//i.test(url); // no script, and nothing that this page's own address would complete
  const end = expiry(new URLSearchParams(url.split("?")[1]));
  const address = (at) => (isWeb && (end === null || at < end) ? url : null);
  const update = (at) => {
    openWith(anchor, address(at));
    if (!isWeb) text(note, ` ${url}`);
    else if (end !== null) text(note, at < end ? ` opens for ${rough(end - at)} more` : ` its address expired ${ago(at - end)}`);
  };
  return { node: make("span", "", anchor, note), update, address };
}

/** The moment, in epoch seconds, when a presigned address expires; null for one that does not. */
function expiry(query) {
  for (const vendor of ["X-Amz", "X-Goog"]) {
    const [, ...digits] = /^(\d{4})(\d\d)(\d\d)T(\d\d)(\d\d)(\d\d)Z$/.exec(query.get(`${vendor}-Date`) ?? "") ?? [];
    const seconds = Number(query.get(`${vendor}-Expires`));
    if (digits.length && seconds) return Date.UTC(digits[0], digits[1] - 1, ...digits.slice(2)) / 1000 + seconds;
  }
  return Number(query.get("Expires")) || null; // signed by version 2
}

function openWith(anchor, url) {
  attribute(anchor, "href", url);
  attribute(anchor, "target", url && "_blank");
  attribute(anchor, "rel", url && "noopener noreferrer");
}

function grouped(stages) {
  const seconds = new Map(GROUPS.map(([group]) => [group, 0]));
  for (const { name, seconds: spent } of stages) {
    const group = GROUP_OF.get(name) ?? "wait";
    seconds.set(group, seconds.get(group) + spent);
  }
  return [...seconds];
}

function insideOf(job, links) {
  const stages = make("ul", "stages");
  stages.setAttribute("aria-label", "Seconds by stage");
  for (const { name, seconds } of job.stages) {
    stages.append(make("li", "", swatch(GROUP_OF.get(name) ?? "wait"), name, make("b", "", span(seconds))));
  }
  const more = make("dl", "facts");
  const pairs = [
    ["task", job.task_id],
    ["finished", new Date(job.finished_at * 1000).toLocaleString()],
    ["waited", job.waited_seconds === null ? "–" : span(job.waited_seconds)],
    ["steps", job.num_steps === null ? "–" : String(job.num_steps)],
    ["images", job.num_images ? String(job.num_images) : "–"],
    ["attempt", String(job.attempt)],
  ];
  if (job.prompt !== null) pairs.push(["prompt", job.prompt]);
  facts(more, pairs);
  if (links.length) more.append(make("dt", "", "opens"), make("dd", "links", ...links.map((link) => link.node)));
  return [make("p", "message", job.message), stages, more];
}

// --- The filter, kept in the address so that it can be sent to a colleague

const FRAGMENT = "#generation=";

function applyFilter() {
  wanted = $("filter").value.trim().toLowerCase();
  if (shown) showJobs(shown);
}

function readAddress() {
  const given = location.hash.startsWith(FRAGMENT) ? location.hash.slice(FRAGMENT.length) : "";
  try {
    $("filter").value = decodeURIComponent(given);
  } catch {
    $("filter").value = given; // typed by hand, with a stray percent sign
  }
  applyFilter();
}

$("filter").addEventListener("input", () => {
  applyFilter();
  const fragment = wanted ? FRAGMENT + encodeURIComponent($("filter").value.trim()) : "";
  history.replaceState(null, "", location.pathname + location.search + fragment);
});
$("tools").addEventListener("submit", (event) => event.preventDefault());
$("last-all").addEventListener("click", () => {
  showsAll = true;
  applyFilter();
});
addEventListener("hashchange", readAddress);
readAddress();
