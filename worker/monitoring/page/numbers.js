// Numbers as people read them. A number and its unit stay on one line: the spaces between them do not break.

const NBSP = "\u00a0";

export const whole = new Intl.NumberFormat("en");
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)}${NBSP}%`;
export const plural = (count, one, many = `${one}s`) => `${whole.format(count)} ${count === 1 ? one : many}`;

export function span(seconds) {
  if (seconds < 0.0995) return units([(seconds * 1000).toFixed(0), "ms"]);
  if (seconds < 9.995) return units([seconds.toFixed(2), "s"]);
  if (seconds < 99.95) return units([seconds.toFixed(1), "s"]);
  return long(seconds);
}

export function long(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return units([s, "s"]);
  if (s < 3600) return units([Math.floor(s / 60), "min"], [s % 60, "s"]);
  if (s < 86400) return units([Math.floor(s / 3600), "h"], [Math.floor((s % 3600) / 60), "min"]);
  return units([Math.floor(s / 86400), "d"], [Math.floor((s % 86400) / 3600), "h"]);
}

/** The larger unit alone: "3 min". */
export function rough(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return units([s, "s"]);
  if (s < 3600) return units([Math.floor(s / 60), "min"]);
  return s < 86400 ? units([Math.floor(s / 3600), "h"]) : units([Math.floor(s / 86400), "d"]);
}

export const ago = (seconds) => `${rough(seconds)}${NBSP}ago`;

export function bytes(count) {
  const names = ["B", "kB", "MB", "GB", "TB"];
  let size = count;
  let unit = 0;
  while (size >= 999.5 && unit < names.length - 1) {
    size /= 1000;
    unit += 1;
  }
  return units([size < 9.95 && unit > 0 ? size.toFixed(1) : size.toFixed(0), names[unit]]);
}

function units(...pairs) {
  return pairs.map((pair) => pair.join(NBSP)).join(NBSP);
}
