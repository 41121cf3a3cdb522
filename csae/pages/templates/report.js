(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const text = document.getElementById("text");
  const detail = document.getElementById("detail");
  const choice = document.getElementById("choice");
  let tokens = [];   // of the passage that is shown
  let spans = [];    // their elements
  let kept = 0;      // the token that was clicked; pointing at another shows that one for the while
  let shown = -1;

  const percent = (share) => `${Math.round(100 * share)} %`;

  function feature(number) {
    const about = data.features[number];
    const names = [...new Set(about.examples.map((example) => example[1].trim() || example[1]))].slice(0, 3);
    const button = element("button", "feature", element("span", "number", `#${number}`));
    button.type = "button";
    names.forEach((name, at) => button.append(at ? " " : "", token(name)));
    if (!names.length) button.append("nowhere else");
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      const open = button.getAttribute("aria-expanded") === "true";
      button.setAttribute("aria-expanded", String(!open));
      if (open) button.nextElementSibling.remove();
      else button.after(card(number, about));
    });
    return button;
  }

  function card(number, about) {
    const list = element("ul", "");
    for (const [before, here, after] of about.examples) {
      const token = element("b", "", visible(here));
      list.append(element("li", "", `…${visible(before)}`, token, `${visible(after)}…`));
    }
    const rate = 100 * about.rate;
    const often = `New at ${rate < 0.1 ? rate.toFixed(2) : rate.toFixed(1)} % of the held-out tokens, most strongly at:`;
    return element("div", "card", element("p", "small", often), list);
  }

  function row(amount, share, ...content) {
    const made = element("div", "row", element("span", "amount", amount), element("div", "", ...content));
    made.style.setProperty("--share", clamp(share).toFixed(3));
    return made;
  }

  function describe(at) {
    const here = tokens[at];
    const made = [element("h3", "", token(here.text), ` token ${at + 1} of ${tokens.length}`)];
    if (!here.counted) {
      made.push(element("p", "", "Left out: a token with an outsized vector that says nothing about the text. " +
        "It is neither encoded nor looked back at."));
      return made;
    }
    const carried = clamp(here.carried);
    const split = element("div", "split", element("i", ""));
    split.firstChild.style.width = `${100 * carried}%`;
    made.push(split, element("p", "",
      element("span", "is-carried", `${percent(carried)} carried over`), ", ",
      element("span", "is-new", `${percent(1 - carried)} new here`),
      element("span", "small", ` · ${percent(here.missed)} of the activation is missed`)));

    made.push(element("h4", "", "New here"));
    const strongest = here.new.length ? here.new[0][1] : 1;
    const fresh = element("ul", "new-list");
    for (const [number, value] of here.new) {
      fresh.append(element("li", "", row(value.toFixed(1), value / strongest, feature(number))));
    }
    made.push(fresh);
    if (here.l0 > here.new.length) made.push(element("p", "small", `and ${here.l0 - here.new.length} weaker features`));
    if (!here.l0) made.push(element("p", "small", "nothing"));

    made.push(element("h4", "", "Carried over from"));
    const list = element("ul", "source-list");
    for (const [from, share, features] of here.sources) {
      const back = at - from;
      const via = element("ul", "via");
      for (const [number, part] of features) {
        via.append(element("li", "", feature(number), element("span", "small", ` ${percent(part)}`)));
      }
      const where = element("span", "small", back === 1 ? " the token before" : ` ${back} tokens back`);
      list.append(element("li", "", row(percent(share), share, token(tokens[from].text), where, via)));
    }
    made.push(list);
    if (!here.sources.length) {
      made.push(element("p", "small", "nothing: there is no earlier token of this document to look back at"));
    }
    return made;
  }

  function show(at) {
    if (at === shown) return;
    for (const span of text.querySelectorAll(".source")) span.classList.remove("source");
    if (shown >= 0) spans[shown].classList.remove("chosen");
    shown = at;
    spans[at].classList.add("chosen");
    for (const [from, share] of tokens[at].sources) {
      spans[from].classList.add("source");
      spans[from].style.setProperty("--from", clamp(share).toFixed(3));
    }
    detail.replaceChildren(...describe(at));
    detail.scrollTop = 0;
  }

  function keep(at) {
    spans[kept].tabIndex = -1;
    spans[kept].setAttribute("aria-selected", "false");
    kept = at;
    spans[kept].tabIndex = 0;
    spans[kept].setAttribute("aria-selected", "true");
    show(at);
  }

  function open(number) {
    const passage = data.passages[number];
    tokens = passage.tokens;
    spans = [];
    shown = -1;
    kept = 0;
    text.replaceChildren();
    tokens.forEach((here, at) => {
      const span = textToken(here.text, at, clamp(here.carried), !here.counted);
      if (here.starts) text.append(element("hr", "boundary"));
      text.append(span);
      spans.push(span);
    });
    [...choice.children].forEach((button, at) => button.setAttribute("aria-pressed", String(at === number)));
    // Begin where there is much to see: of the later tokens, the one to which most was carried.
    let best = tokens.length - 1;
    tokens.forEach((here, at) => {
      if (at > tokens.length / 3 && at < tokens.length / 1.5 && here.carried > tokens[best].carried) best = at;
    });
    keep(best);
  }

  readAlong(text, { spans: () => spans, kept: () => kept, show, keep });

  if (data.passages.length > 1) {
    data.passages.forEach((passage, number) => {
      const button = element("button", "", `Passage ${number + 1}`);
      button.type = "button";
      button.addEventListener("click", () => open(number));
      choice.append(button);
    });
  }
  open(0);
})();
