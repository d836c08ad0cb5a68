// The last hour: three numbers with a bar for each of its minutes.

import { $, attribute, keyed, make, text } from "./dom.js";
import { rough, span, whole } from "./numbers.js";

const SVG = "http://www.w3.org/2000/svg";
const MINUTES = 60;
const HEIGHT = 24;
const LEAST = 1.5; // of a bar, so that one job beside hundreds is seen

export function showTrends({ last_hour: hour, queues }) {
  text($("rate"), hour.jobs_per_minute.toFixed(1));
  const numFailed = sum(hour.failed);
  text($("rate-more"), `${whole.format(sum(hour.complete))} in the last hour${numFailed ? `, ${whole.format(numFailed)} failed` : ""}`);
  chart("rate", "Jobs a minute", hour.complete, (count) => whole.format(count), hour.failed);

  text($("took"), orDash(hour.seconds_p50, span));
  text($("took-more"), hour.seconds_p95 === null ? "no job in the last hour" : `p95 ${span(hour.seconds_p95)}`);
  chart("took", "Mean time of a job", hour.seconds, span);

  const ready = queues.filter((queue) => queue.role === "jobs").map((queue) => queue.num_messages);
  text($("queue"), orDash(ready.length ? sum(ready) : null, (count) => whole.format(count)));
  text($("queue-more"), hour.waited_p50 === null ? "in the jobs’ queue" : `waited ${rough(hour.waited_p50)}, p95 ${rough(hour.waited_p95)}`);
  chart("queue", "Waiting jobs", hour.waiting, (count) => whole.format(count));
}

const sum = (values) => values.reduce((total, one) => total + one, 0);
const orDash = (value, say) => (value === null ? "–" : say(value));

/** Draw a chart: a path for the values and one for those on top of them. */
function chart(name, title, values, say, above = []) {
  const highest = Math.max(0, ...values.map((value, index) => value + (above[index] ?? 0)));
  keyed($(`${name}-chart`), [{ values, above, highest }], () => name, makeChart);
  const svg = $(`${name}-chart`).firstElementChild.firstElementChild;
  attribute(svg, "aria-label", `${title}, the last hour: at most ${say(highest)}, now ${orDash(values.at(-1), say)}`);
  text($(`${name}-chart`).querySelector(".most"), highest ? `at most ${say(highest)}` : "");
}

function makeChart() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${MINUTES} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  const paths = ["bars", "bars bad"].map((className) => {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("class", className);
    svg.append(path);
    return path;
  });
  const node = make("div", "", svg, make("p", "scale", make("span", "", "1\u00a0h ago"), make("span", "most"), make("span", "", "now")));
  const update = ({ values, above, highest }) => {
    attribute(paths[0], "d", bars(values, highest));
    attribute(paths[1], "d", bars(above, highest, values));
  };
  return { node, update };
}

/** The path of a bar for each value, the last one at the right edge, each on top of `below`'s. */
function bars(values, highest, below = []) {
  const first = MINUTES - values.length;
  const tall = (value) => (value ? Math.max(LEAST, (HEIGHT * value) / highest) : 0);
  return values
    .map((value, index) => {
      const height = Math.min(HEIGHT, tall(value));
      const bottom = Math.max(height, HEIGHT - tall(below[index]));
      return height ? `M${first + index + 0.1} ${bottom.toFixed(2)}v-${height.toFixed(2)}h.8v${height.toFixed(2)}z` : "";
    })
    .join("");
}
