  // ---- the text, and what is said of a token ----

  const spans = [];
  let shown = -1;

  function row(amount, filled, ...content) {
    const made = element("div", "row", element("span", "amount", amount), element("div", "names-of", ...content));
    made.style.setProperty("--share", clamp(filled).toFixed(3));
    return made;
  }

  function list(className, rows) {
    const made = element("ul", className);
    made.append(...rows.map((content) => element("li", "", content)));
    return made;
  }

  const SMALLEST = 6;  // of the new features that are shown at once

  function describe(t) {
    const made = [element("h3", "", token(piece(t)), ` token ${t + 1} of ${n}`)];
    if (leftOut.has(t)) {
      made.push(element("p", "", "Left out: a token with an outsized vector that says nothing about the text. It is " +
        "neither encoded nor looked back at."));
      return made;
    }
    const isNew = grouped(data.new[t], 2);
    if (looksBack) {
      const of = clamp(data.c[t] / UNIT.share), split = element("div", "split", element("i", ""));
      split.firstChild.style.width = `${100 * of}%`;
      made.push(split, element("p", "",
        element("span", "is-carried", `${share(data.c[t], 0)} carried`), ", ",
        element("span", "is-new", `${share(UNIT.share - data.c[t], 0)} new here`),
        element("span", "small", ` · ${share(data.missed[t], 0)} of the activation is missed`)));
    } else {
      made.push(element("p", "small", `${share(data.missed[t], 0)} of the activation is missed`));
    }
    made.push(element("h4", "", looksBack ? "New here" : "Active here"));
    if (!isNew.length) made.push(element("p", "small", "nothing"));
    const strengths = isNew.map(([feature, activity]) =>
      row((activity / UNIT.activity).toFixed(1), activity / isNew[0][1], link(main, feature)));
    made.push(list("new-list", strengths.slice(0, SMALLEST)));
    if (strengths.length > SMALLEST) {
      made.push(element("details", "", element("summary", "small", `and ${strengths.length - SMALLEST} weaker ones`),
        list("new-list", strengths.slice(SMALLEST))));
    }
    return looksBack ? [...made, ...describeCarried(t)] : made;
  }

  // The exact parts of c: gathered by feature, and below that the largest single ones.
  function describeCarried(t) {
    const made = [element("h4", "", "Carried here, by feature")];
    const isCarried = grouped(data.carried[t], 2), parts = grouped(data.parts[t], 3);
    if (!parts.length) {
      made.push(element("p", "small", "nothing: no earlier token of this window has anything to carry here"));
      return made;
    }
    made.push(element("p", "small", "Shares of c, the vector that is carried here. A feature’s share is the sum of " +
      "its parts: one for each earlier token at which it was new."));
    const byFeature = list("source-list", isCarried.map(([feature, part], at) => {
      const from = parts.filter(([, other]) => other === feature).map(([position]) => goTo(position));
      const sources = from.length ? [" · most from ", ...from.slice(0, 2).flatMap((a, i) => [i ? ", " : "", a])] : [];
      return row(share(part, 1), part / isCarried[0][1], link(main, feature),
        element("span", "small from", ` ${count(data.gathered[t][at], "part")}`, ...sources));
    }));
    byFeature.id = "by-feature";
    const [features, rest] = data.rest[t];
    const gathered = isCarried.reduce((total, [, part]) => total + part, 0);
    const sums = sum([share(rest, 1), `${count(features, "other feature")}, each below ${share(data.threshold, 0)}`],
      [share(gathered + rest, 1), "all features together"]);
    sums.id = "sum-by-feature";
    made.push(byFeature, sums);

    const single = list("source-list", parts.map(([from, feature, part]) => {
      const back = t - from;
      return row(share(part, 2), part / parts[0][2], goTo(from),
        element("span", "small", back === 1 ? " 1 token back " : ` ${back} tokens back `), link(main, feature));
    }));
    single.id = "parts";
    const listed = parts.reduce((total, part) => total + part[2], 0);
    const [others, left] = data.others[t];
    const total = sum([share(left, 2), `${others.toLocaleString("en")} other parts`],
      [share(listed + left, 2), "all parts together"],
      [data.remainder[t].toExponential(0).replace("-", "−"), "remainder: what they miss of c, in its length"]);
    total.id = "sum";
    made.push(element("details", "", element("summary", "", "The largest single parts"), single, total));
    return made;
  }

  function goTo(t) {
    const made = element("a", "", token(piece(t)));
    made.href = `#token-${t + 1}`;
    return made;
  }

  function sum(...lines) {
    const made = element("div", "sum");
    lines.forEach(([amount, what], at) => {
      made.append(element("span", at === 1 ? "total" : "", amount), element("span", at === 1 ? "total" : "", what));
    });
    return made;
  }

  function show(t) {
    if (t === shown) return;
    for (const span of text.querySelectorAll(".source")) span.classList.remove("source");
    if (shown >= 0) spans[shown].classList.remove("chosen");
    shown = t;
    spans[t].classList.add("chosen");
    const from = new Map();
    for (const [position, , part] of grouped(data.parts[t], 3)) from.set(position, (from.get(position) || 0) + part);
    for (const [position, part] of from) {
      if (part <= 0) continue;
      spans[position].classList.add("source");
      spans[position].style.setProperty("--from", clamp(5 * part / UNIT.share).toFixed(3));
    }
    detail.replaceChildren(...describe(t));
    detail.scrollTop = 0;
    for (const one of timelines) one.point(t);
  }

  function keep(t) {
    spans[kept].tabIndex = -1;
    spans[kept].setAttribute("aria-selected", "false");
    kept = t;
    spans[t].tabIndex = 0;
    spans[t].setAttribute("aria-selected", "true");
    show(t);
  }

  // A token in the text, which can be pointed at. The more is carried, the bluer it is; grey where it is left out.
  function textToken(t) {
    const span = element("span", leftOut.has(t) ? "t out" : "t");
    span.style.setProperty("--carried-share", clamp(2 * data.c[t] / UNIT.share).toFixed(3));
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.tabIndex = -1;
    span.dataset.at = t;
    // A line break is marked, so that there is something to point at.
    for (const part of data.tokens[t].split(/(\n)/)) {
      if (part === "\n") span.append(element("span", "mark", "↵"));
      span.append(part);
    }
    if (!data.tokens[t]) span.append(element("span", "mark", "·"));
    return span;
  }

  for (let t = 0; t < n; t++) {
    const span = textToken(t);
    if (cuts.has(t)) text.append(element("hr", "boundary"));
    text.append(span);
    spans.push(span);
  }

  // Pointing at a token shows it, until the pointer leaves; a click, a tap or the keyboard keeps it.
  const pointedAt = (event) => {
    const span = event.target.closest(".t");
    return span ? Number(span.dataset.at) : -1;
  };
  text.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && pointedAt(event) >= 0) show(pointedAt(event));
  });
  text.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") show(kept);
  });
  for (const kind of ["click", "focusin"]) {
    text.addEventListener(kind, (event) => {
      if (pointedAt(event) >= 0) keep(pointedAt(event));
    });
  }
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const next = step ? kept + step : { Home: 0, End: n - 1 }[event.key];
    if (event.key === "Enter") detail.querySelector("a.feature")?.focus();
    else if (spans[next]) spans[next].focus();
    else return;
    event.preventDefault();
  });
  detail.addEventListener("keydown", (event) => {
    const links = [...detail.querySelectorAll("a")];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") spans[kept].focus();
    else if (step) links[links.indexOf(document.activeElement) + step]?.focus();
    else return;
    event.preventDefault();
  });

