(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const [text, detail, reading, featurePage] = ["text", "detail", "reading", "feature"].map($);
  const UNIT = { share: 10000, activity: 100 };  // what whole numbers in the data are parts of
  const ROW = 16;  // height in pixels; also in the style sheet
  const NAMES = 3, STRONGEST = 6, PASSAGES = 8, CONTEXT = 12;
  const n = data.tokens.length;
  const leftOut = new Set(data.left_out), cuts = new Set(data.cuts);

  // [[a, b, ...], ...] -> the list cut in pieces of `size` numbers.
  const grouped = (flat, size) =>
    Array.from({ length: flat.length / size }, (_, i) => flat.slice(i * size, (i + 1) * size));
  const share = (number, digits = 1) => `${(100 * number / UNIT.share).toFixed(digits)} %`.replace("-", "−");
  const piece = (t) => data.tokens[t] || "…";

  // Feature -> [position, amount], in the order of the text.
  function byFeature(lists) {
    const found = new Map();
    lists.forEach((flat, t) => {
      for (const [feature, amount] of grouped(flat, 2)) {
        if (!found.has(feature)) found.set(feature, []);
        found.get(feature).push([t, amount]);
      }
    });
    return found;
  }
  let kept = 0;  // the token that was clicked; pointing at another shows that one for the while
  const fresh = byFeature(data.new), carried = byFeature(data.carried);
  const strongest = (pairs) => [...pairs].sort((a, b) => b[1] - a[1] || a[0] - b[0]);

  // The tokens at which a feature is most active, each once.
  function words(pairs) {
    const found = new Set();
    for (const [t] of strongest(pairs)) {
      if (data.tokens[t].trim()) found.add(data.tokens[t].trim());
      if (found.size === NAMES) break;
    }
    return [...found];
  }

  // What a feature is called by: the tokens at which it is most active in all held-out text, where that is known.
  function called(feature) {
    const known = (data.examples?.[feature]?.examples || []).map(([, word]) => word.trim() || word);
    return known.length ? [...new Set(known)].slice(0, NAMES) : words(fresh.get(feature) || []);
  }

  function link(feature) {
    const made = element("a", "feature", element("span", "number", `#${feature}`));
    made.href = `#feature-${feature}`;
    called(feature).forEach((word, at) => made.append(at ? " " : "", token(word)));
    return made;
  }

  // ---- timelines ----

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Draws rows of features against positions into a container; fresh, carried: Map feature -> [position, amount].
  // named: with their names beside them. paged: features have pages to go to.
  // Gives {draw, point}: to draw it again, and to show a position in it.
  function timeline(container, label, rows, fresh, carried, named, paged) {
    const canvas = element("canvas", ""), here = element("div", "here"), ticks = element("div", "ticks");
    const names = element("div", "names"), readout = element("p", "readout small");
    let at = kept, row = 0;
    for (const feature of rows) {
      const name = element(paged ? "a" : "span", "", element("span", "number", `#${feature}`),
        element("span", "words", (paged ? called(feature) : words(fresh.get(feature) || [])).map(visible).join(" ")));
      if (paged) name.href = `#feature-${feature}`;
      names.append(name);
    }
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${label}: arrow keys move, Enter opens the ${paged ? "feature" : "token"}`);
    ticks.setAttribute("aria-hidden", "true");
    here.hidden = true;  // until someone points: a line could be taken for something in the text
    readout.setAttribute("role", "status");
    const chart = element("div", "chart", element("div", "plot", canvas, here), ticks, readout);
    container.replaceChildren(...(named ? [names] : []), chart);

    function draw() {
      const width = chart.clientWidth, height = ROW * rows.length, ratio = window.devicePixelRatio || 1;
      if (!width) return;
      canvas.width = width * ratio;
      canvas.height = height * ratio;
      canvas.style.height = `${height}px`;
      const pen = canvas.getContext("2d");
      pen.scale(ratio, ratio);
      // Where there are more tokens than pixels, a column stands for several, and is as deep as their mean.
      const columns = Math.min(n, Math.floor(width)), wide = width / columns;
      const depths = (pairs, depth) => {
        const sums = new Float32Array(columns), counts = new Float32Array(columns);
        for (let t = 0; t < n; t++) counts[Math.floor(t * columns / n)]++;
        for (const [t, amount] of pairs || []) sums[Math.floor(t * columns / n)] += depth(amount);
        return sums.map((sum, column) => sum && Math.min(1, Math.max(0.15, sum / counts[column])));
      };
      const [blue, orange, soft, line] = ["--carried", "--new", "--soft", "--line"].map(colour);
      rows.forEach((feature, number) => {
        const top = number * ROW + 1, tall = ROW - 2;
        const isCarried = depths(carried.get(feature), (amount) => 0.2 + 10 * amount / UNIT.share);
        const isNew = depths(fresh.get(feature), (amount) => Math.min(1, 0.55 + 0.1 * amount / UNIT.activity));
        const fill = (colours, depth, column, half) => {
          pen.fillStyle = `rgb(${colours} / ${depth.toFixed(3)})`;
          pen.fillRect(column * wide, top + (half ? tall / 2 : 0), wide + 0.3, half ? tall / 2 : tall);
        };
        for (let column = 0; column < columns; column++) {
          if (isCarried[column]) fill(blue, isCarried[column], column, false);
          if (isNew[column]) fill(orange, isNew[column], column, isCarried[column] > 0);
        }
        pen.fillStyle = line;
        pen.fillRect(0, top + ROW - 1.5, width, 0.5);
      });
      pen.strokeStyle = soft;
      pen.setLineDash([4, 3]);
      for (const t of data.cuts) {
        pen.beginPath();
        pen.moveTo(t * width / n, 0);
        pen.lineTo(t * width / n, height);
        pen.stroke();
      }
      const apart = Math.ceil(n / Math.max(2, Math.floor(width / 130)));
      const step = [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000].find((step) => step >= apart) || apart;
      ticks.replaceChildren();
      for (let t = 0; t < n - step / 3; t += step) {
        const words = data.tokens.slice(t, t + 8).join("").replace(/\s+/g, " ").trim().slice(0, 16);
        const tick = element("span", "", `${t + 1} `, element("b", "", words));
        tick.style.left = `${100 * t / n}%`;
        tick.style.maxWidth = `${100 * step / n}%`;
        ticks.append(tick);
      }
    }

    function point(t) {
      at = t;
      here.hidden = false;
      here.style.left = `${100 * (t + 0.5) / n}%`;
    }

    function say(t, number) {
      row = Math.min(rows.length - 1, Math.max(0, number));
      for (const other of timelines) other.point(t);
      point(t);
      [...names.children].forEach((name, i) => name.classList.toggle("at", i === row));
      const feature = rows[row];
      const amount = (map) => ((map.get(feature) || []).find(([position]) => position === t) || [0, 0])[1];
      const state = [];
      const activity = (amount(fresh) / UNIT.activity).toFixed(1);
      if (amount(fresh)) state.push(`${carried.size ? "new" : "active"}, ${activity}`);
      if (amount(carried)) state.push(`carried, ${share(amount(carried))} of c`);
      const goTo = element("a", "", `token ${t + 1}`);
      goTo.href = `#token-${t + 1}`;
      const passage = (from, to) => data.tokens.slice(Math.max(0, from), to).join("");
      const before = passage(t - 6, t), after = passage(t + 1, t + 6);
      readout.replaceChildren(goTo, ` …${visible(before)}`, token(piece(t)), `${visible(after)}…`, element("br", ""),
        paged ? link(feature) : `#${feature} ${words(fresh.get(feature) || []).join(" ")}`,
        `: ${state.join("; ") || "not present"}`);
    }

    const place = (event) => {
      const box = canvas.getBoundingClientRect();
      return [Math.min(n - 1, Math.max(0, Math.floor((event.clientX - box.left) / box.width * n))),
        Math.floor((event.clientY - box.top) / ROW)];
    };
    canvas.addEventListener("pointermove", (event) => say(...place(event)));
    canvas.addEventListener("click", (event) => {
      if (event.pointerType === "touch") say(...place(event));  // a finger can't point first; the readout has links
      else location.hash = `token-${place(event)[0] + 1}`;
    });
    canvas.addEventListener("focus", () => { if (canvas.matches(":focus-visible")) say(at, row); });
    canvas.addEventListener("keydown", (event) => {
      const far = event.shiftKey ? 10 : 1;
      const move = { ArrowRight: [far, 0], ArrowLeft: [-far, 0], ArrowDown: [0, 1], ArrowUp: [0, -1], Home: [-n, 0],
        End: [n, 0] }[event.key];
      if (event.key === "Enter") location.hash = paged && rows.length ? `feature-${rows[row]}` : `token-${at + 1}`;
      else if (move) say(Math.min(n - 1, Math.max(0, at + move[0])), row + move[1]);
      else return;
      event.preventDefault();
    });
    new ResizeObserver(draw).observe(chart);
    return { draw, point };
  }

  const timelines = [];  // those of the reading
  let strip = null;      // that of the feature
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const one of [...timelines, strip]) one?.draw();
  });

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

  function describe(t) {
    const made = [element("h3", "", token(piece(t)), ` token ${t + 1} of ${n}`)];
    if (leftOut.has(t)) {
      made.push(element("p", "", "Left out: a token with an outsized vector that says nothing about the text. It is " +
        "neither encoded nor looked back at."));
      return made;
    }
    const isNew = grouped(data.new[t], 2), isCarried = grouped(data.carried[t], 2), parts = grouped(data.parts[t], 3);
    const looksBack = data.figures.arch === "contextual";
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
      row((activity / UNIT.activity).toFixed(1), activity / isNew[0][1], link(feature)));
    made.push(list("new-list", strengths.slice(0, STRONGEST)));
    if (strengths.length > STRONGEST) {
      made.push(element("details", "", element("summary", "small", `and ${strengths.length - STRONGEST} weaker ones`),
        list("new-list", strengths.slice(STRONGEST))));
    }
    if (!looksBack) return made;

    made.push(element("h4", "", "Carried here: the exact parts of c"));
    if (!parts.length) {
      made.push(element("p", "small", "nothing: no earlier token of this window has anything to carry here"));
      return made;
    }
    made.push(list("source-list", parts.map(([from, feature, part]) => {
      const back = t - from;
      const where = element("a", "", token(piece(from)));
      where.href = `#token-${from + 1}`;
      return row(share(part, 2), part / parts[0][2], where,
        element("span", "small", back === 1 ? " 1 token back " : ` ${back} tokens back `), link(feature));
    })));
    const listed = parts.reduce((sum, part) => sum + part[2], 0);
    const [count, others] = data.others[t];
    const sum = element("div", "sum");
    sum.append(element("span", "", share(others, 2)), element("span", "", `${count.toLocaleString("en")} other parts`),
      element("span", "total", share(listed + others, 2)), element("span", "total", "all parts together"),
      element("span", "", data.remainder[t].toExponential(0).replace("-", "−")),
      element("span", "", "remainder: what they miss of c, in its length"));
    sum.id = "sum";
    made.push(sum, element("h4", "", "The same by feature"), list("source-list",
      isCarried.map(([feature, part]) => row(share(part, 1), part / isCarried[0][1], link(feature)))));
    const named = isCarried.reduce((total, [, part]) => total + part, 0);
    const less = `in features with less than ${share(data.threshold, 0)} each`;
    made.push(element("p", "small", `${share(UNIT.share - named)} ${less}`));
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

  // ---- the page of a feature ----

  function passages(className, pairs, amount) {
    const made = element("ul", `passages ${className}`);
    for (const [t, value] of pairs.slice(0, PASSAGES)) {
      const around = element("a", "", `…${visible(data.tokens.slice(Math.max(0, t - CONTEXT), t).join(""))}`,
        element("b", "", visible(piece(t))), `${visible(data.tokens.slice(t + 1, t + 1 + CONTEXT / 2).join(""))}…`);
      around.href = `#token-${t + 1}`;
      made.append(element("li", "", element("span", "amount", amount(value)), around));
    }
    if (pairs.length > PASSAGES) made.append(element("li", "small", "", `and ${pairs.length - PASSAGES} more`));
    return made;
  }

  function logits(title, found) {
    const made = [element("h3", "", title)];
    for (const [name, scores] of [["raised", found.up], ["lowered", found.down]]) {
      const rows = grouped(scores, 2).map(([word, score]) => element("li", "", element("span", "token", visible(word)),
        element("span", "score", score.toFixed(1).replace("-", "−"))));
      const words = element("ul", "logits");
      words.append(element("li", "small", name), ...rows);
      made.push(words);
    }
    return element("div", "", ...made);
  }

  function describeFeature(feature) {
    const isNew = fresh.get(feature) || [], isCarried = carried.get(feature) || [];
    const newAt = new Set(isNew.map(([t]) => t)), only = isCarried.filter(([t]) => !newAt.has(t));
    const back = element("a", "", "← back to the text");
    back.href = `#token-${kept + 1}`;
    const counted = n - leftOut.size, chart = element("div", "strip");
    const made = [element("p", "back", back, element("span", "small", " (Escape)")),
      element("h1", "", `Feature #${feature} `, ...called(feature).flatMap((word) => [token(word), " "])),
      element("p", "", element("span", "is-new", `New at ${isNew.length}`), ` of ${counted} tokens; `,
        element("span", "is-carried", `only carried at ${only.length}`), " others, with ",
        `${share(data.threshold, 0)} or more of c each.`), chart];
    const columns = element("div", "columns");
    columns.append(
      element("div", "", element("h2", "", "Most active"), passages("new", strongest(isNew),
        (value) => (value / UNIT.activity).toFixed(1))),
      element("div", "", element("h2", "", "Only carried"), only.length
        ? passages("carried", strongest(only), (value) => share(value))
        : element("p", "small", "nowhere in this text")));
    made.push(columns);
    const held = data.examples?.[feature];
    if (held) {
      const rate = 100 * held.rate, list = element("ul", "passages new");
      for (const [before, here, after, activity] of held.examples) {
        list.append(element("li", "", element("span", "amount", activity.toFixed(1)), element("span", "around",
          `…${visible(before)}`, element("b", "", visible(here)), `${visible(after)}…`)));
      }
      made.push(element("h2", "", "In all held-out text"), element("p", "small",
        `New at ${rate.toFixed(rate < 0.1 ? 2 : 1)} % of the held-out tokens, most strongly at:`), list);
    }
    made.push(element("h2", "", "Effect on the next token"));
    const effect = data.features[feature];
    if (effect) {
      const both = element("div", "columns", logits("Where it is new", effect.new));
      both.append(effect.carried ? logits("By what it carried in this text, all parts added up", effect.carried)
        : element("p", "small", "It carried nothing in this text."));
      made.push(both);
      if (effect.carried) {
        made.push(element("p", "small", "The cosine between what it writes where it is new and what it carried is " +
          `${effect.cosine.toFixed(2).replace("-", "−")}.`));
      }
      made.push(element("p", "small", "The direct path only: its direction through the unembedding, with the weights " +
        "of the final norm folded in and its division by the length of the stream left out. The numbers are standard " +
        "deviations from the mean of all tokens; the blocks in between do more."));
    } else {
      made.push(element("p", "small", "Not worked out: it is not among the features that add most to this text."));
    }
    featurePage.replaceChildren(...made);
    const its = (map) => new Map(map.has(feature) ? [[feature, map.get(feature)]] : []);
    strip = timeline(chart, `Where feature ${feature} is`, [feature], its(fresh), its(carried), false, false);
  }

  // ---- which page is shown: #feature-12, #token-57, or the reading ----

  let came = null;  // what had the focus before the page of a feature
  let scrolled = 0;

  function route() {
    const [, kind, number] = location.hash.match(/^#(feature|token)-(\d+)$/) || [];
    if (kind === "feature") {
      if (!reading.hidden) [came, scrolled] = [document.activeElement, scrollY];
      reading.hidden = true;
      featurePage.hidden = false;
      describeFeature(Number(number));
      scrollTo({ top: 0, behavior: "instant" });
      featurePage.focus();
      return;
    }
    const left = reading.hidden;
    reading.hidden = false;
    featurePage.hidden = true;
    if (kind === "token" && Number(number) >= 1 && Number(number) <= n && !(left && Number(number) === kept + 1)) {
      keep(Number(number) - 1);
      spans[kept].scrollIntoView({ block: "center" });
      spans[kept].focus({ preventScroll: true });
    } else if (left) {
      scrollTo({ top: scrolled, behavior: "instant" });
      came?.focus?.({ preventScroll: true });
    }
  }
  addEventListener("hashchange", route);
  featurePage.addEventListener("keydown", (event) => {
    if (event.key === "Escape") location.hash = `token-${kept + 1}`;
  });

  // Begin where there is much to see: in the middle, at the token to which most was carried.
  let best = Math.floor(n / 2);
  data.c.forEach((of, t) => {
    if (t > n / 3 && t < n / 1.5 && of > data.c[best]) best = t;
  });
  keep(best);
  timelines.push(timeline($("timeline"), "Features along the text", data.rows, fresh, carried, true, true));
  if (data.beside) {
    const other = byFeature(data.beside.new);
    const label = "Features of the per-token SAE";
    timelines.push(timeline($("beside"), label, data.beside.rows, other, new Map(), true, false));
  }
  route();
})();
