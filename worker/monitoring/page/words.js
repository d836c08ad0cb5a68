// Words with an explanation: a button opens its popover by keyboard, touch and click; a mouse need only rest on it.

const REST_MS = 250;
const GAP_PX = 6;
let timer = 0;
let opened = null;

/** Make the button of a word; the popover `word-NAME` is in the page. */
export function describe(button, name) {
  button.setAttribute("popovertarget", `word-${name}`);
  prepare(button);
}

export function prepare(button) {
  const tip = button.popoverTargetElement;
  if (!tip) return; // an old browser: the word stays a word
  button.setAttribute("popovertargetaction", "show"); // a click behind a hover must not close it again
  button.setAttribute("aria-describedby", tip.id);
  button.addEventListener("click", () => open(button, tip));
  for (const node of [button, tip]) {
    node.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && later(() => open(button, tip), node === tip));
    node.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && later(() => close(tip)));
  }
}

/** Act once the mouse has come to rest, so that it can pass over a word, and from a word onto its popover. */
function later(act, isOnTip = false) {
  clearTimeout(timer);
  if (!isOnTip) timer = setTimeout(act, REST_MS);
}

function open(button, tip) {
  if (!tip.matches(":popover-open")) tip.showPopover({ source: button });
  opened = tip;
  place(button, tip);
}

function close(tip) {
  if (tip.matches(":popover-open")) tip.hidePopover();
}

/** Put the popover below its word, above it where there is no room, and inside the window. */
function place(button, tip) {
  const word = button.getBoundingClientRect();
  const width = document.documentElement.clientWidth;
  const left = Math.max(GAP_PX, Math.min(word.left, width - tip.offsetWidth - GAP_PX));
  const below = word.bottom + GAP_PX;
  const isAbove = below + tip.offsetHeight > window.innerHeight && word.top - GAP_PX > tip.offsetHeight;
  tip.style.setProperty("left", `${left}px`);
  tip.style.setProperty("top", `${isAbove ? word.top - GAP_PX - tip.offsetHeight : below}px`);
}

document.querySelectorAll(".term").forEach(prepare);
// It does not move with its word.
addEventListener("scroll", () => opened && close(opened), { passive: true });
