"use strict";
// Elements, and how text is shown in them.

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
