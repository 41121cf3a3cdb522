"use strict";
// What the scripts of the pages share.

// element("p", "small", "text", child, ...): a class may be empty; strings become text, never markup.
function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

const clamp = (share) => Math.min(1, Math.max(0, share));

// White space that stands alone would not be seen.
function visible(piece) {
  const marked = piece.replace(/\n/g, "↵").replace(/\t/g, "⇥");
  return piece.trim() ? marked : marked.replace(/ /g, "␣");
}

function token(piece) {
  return element("span", "token", visible(piece.trim() || piece) || "…");
}

// A token in the text, which can be pointed at; `out` where it doesn't take part. carried: 0 to 1, how blue it is.
function textToken(piece, at, carried, out) {
  const span = element("span", out ? "t out" : "t");
  span.style.setProperty("--carried-share", carried.toFixed(3));
  span.setAttribute("role", "option");
  span.setAttribute("aria-selected", "false");
  span.tabIndex = -1;
  span.dataset.at = at;
  // A line break is marked, so that there is something to point at.
  for (const part of piece.split(/(\n)/)) {
    if (part === "\n") span.append(element("span", "mark", "↵"));
    span.append(part);
  }
  if (!piece) span.append(element("span", "mark", "·"));
  return span;
}

// Pointing at a token shows it, until the pointer leaves; a click, a tap or the keyboard keeps it.
// kept(): which one is; spans(): all of them; enter(): what Enter does.
function readAlong(text, { spans, kept, show, keep, enter }) {
  const at = (event) => {
    const span = event.target.closest(".t");
    return span ? Number(span.dataset.at) : -1;
  };
  text.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && at(event) >= 0) show(at(event));
  });
  text.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") show(kept());
  });
  for (const kind of ["click", "focusin"]) {
    text.addEventListener(kind, (event) => {
      if (at(event) >= 0) keep(at(event));
    });
  }
  text.addEventListener("keydown", (event) => {
    const last = spans().length - 1;
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = step ? kept() + step : event.key === "Home" ? 0 : event.key === "End" ? last : -1;
    if (event.key === "Enter" && enter) enter();
    else if (next >= 0 && next <= last) spans()[next].focus();
    else return;
    event.preventDefault();
  });
}
