// The document, touched only where something has changed: focus, selection and what is opened survive an update.
// Whatever comes from a job is put in as text.

export const $ = (id) => document.getElementById(id);
const rowsOf = new WeakMap();

export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export function attribute(node, name, value) {
  if (value === null) node.removeAttribute(name);
  else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

export function make(tag, className = "", ...children) {
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
export function keyed(list, items, keyOf, makeRow) {
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
export function stack(bar, parts, label) {
  keyed(bar, parts.filter(([, value]) => value > 0), ([kind]) => kind, ([kind]) => {
    const node = make("span", `seg c-${kind}`);
    return { node, update: ([, value]) => node.style.setProperty("flex-grow", String(value)) };
  });
  attribute(bar, "aria-label", label);
}

export function progress(bar, share, valueText) {
  const held = Math.min(1, Math.max(0, share));
  bar.firstElementChild.style.setProperty("--share", held.toFixed(4));
  attribute(bar, "aria-valuenow", String(Math.round(100 * held)));
  attribute(bar, "aria-valuetext", valueText);
}

export function progressBar() {
  const bar = make("div", "bar", make("div", "fill"));
  bar.setAttribute("role", "progressbar");
  bar.setAttribute("aria-valuemin", "0");
  bar.setAttribute("aria-valuemax", "100");
  return bar;
}

export function swatch(kind) {
  return make("i", `swatch c-${kind}`);
}

/** Fill a `dl` with `[term, description]` pairs. */
export function facts(list, pairs) {
  const flat = pairs.flatMap(([term, said]) => [["dt", term, term], ["dd", term, said]]);
  keyed(list, flat, ([tag, term]) => `${tag} ${term}`, ([tag]) => {
    const node = make(tag);
    return { node, update: ([, , said]) => text(node, said) };
  });
}
