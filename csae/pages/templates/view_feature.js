  // ---- the page of a feature ----

  const SHOWN = 8, CONTEXT = 12, STRETCHES = 5, LONGEST_LABEL = 200;

  // The first `shown` of many entries, and the others behind a summary.
  function folded(className, entries, shown) {
    const first = element("ul", className, ...entries.slice(0, shown));
    if (entries.length <= shown) return [first];
    const more = element("details", "more", element("summary", "small", `all ${entries.length.toLocaleString("en")}`));
    more.addEventListener("toggle", () => {  // made when they are asked for: they may be thousands
      if (more.children.length === 1) more.append(element("ul", className, ...entries.slice(shown)));
    }, { once: true });
    return [first, more];
  }

  const entry = (amount, around) => element("li", "", element("span", "amount", amount), around);

  function passage(t, end = t + 1) {
    const before = data.tokens.slice(Math.max(0, t - CONTEXT), t).join("");
    const made = element("a", "", `…${visible(before)}`, element("b", "", visible(data.tokens.slice(t, end).join("")) || "…"),
      `${visible(data.tokens.slice(end, end + CONTEXT / 2).join(""))}…`);
    made.href = `#token-${t + 1}`;
    return made;
  }

  // Those at blanks and rulers come last.
  function passages(className, pairs, amount) {
    const ordered = strongest(pairs), plain = newest(pairs);
    const all = [...plain, ...ordered.filter(([t]) => isFiller(data.tokens[t]))];
    return folded(`passages ${className}`, all.map(([t, value]) => entry(amount(value), passage(t))), SHOWN);
  }

  // Bars for the counts of equal parts of 0 to the largest activity, their heights by the logarithm.
  function histogram(counts, largest, where) {
    const highest = Math.log1p(Math.max(...counts)), bars = element("div", "bars");
    counts.forEach((times, at) => {
      const bar = element("i", ""), [from, to] = [at, at + 1].map((end) => (largest * end / counts.length).toFixed(1));
      bar.style.height = `${100 * Math.log1p(times) / highest}%`;
      bar.title = `${from} to ${to}: ${count(times, "token")}`;
      bars.append(bar);
    });
    const total = counts.reduce((sum, times) => sum + times, 0);
    const half = counts.findIndex((_, at) => counts.slice(0, at + 1).reduce((sum, times) => sum + times, 0) >= total / 2);
    bars.setAttribute("role", "img");
    bars.setAttribute("aria-label", `Histogram of ${total} activities in ${where}: half are below ` +
      `${(largest * (half + 1) / counts.length).toFixed(1)}, the largest is ${largest.toFixed(1)}`);
    return element("figure", "histogram", bars, element("div", "axis", element("span", "", "0"),
      element("span", "", largest.toFixed(1))), element("figcaption", "", `How active it is, in ${where}; heights by `
      + "the logarithm of the number of tokens."));
  }

  function counted(pairs, bins = 20) {
    const largest = Math.max(...pairs.map(([, value]) => value)), counts = Array(bins).fill(0);
    for (const [, value] of pairs) counts[Math.min(bins - 1, Math.floor(value * bins / largest))]++;
    return [counts, largest / UNIT.activity];
  }

  // Where it is present without a gap: new or carried. A window or passage ends them all.
  function stretches(isNew, isCarried) {
    const fresh = new Set(isNew.map(([t]) => t)), found = [];
    const present = [...new Set([...fresh, ...isCarried.map(([t]) => t)])].sort((a, b) => a - b);
    for (const t of present) {
      const last = found.at(-1);
      if (last && last.end === t && !cuts.has(t)) last.end = t + 1;
      else found.push({ begin: t, end: t + 1, fresh: 0 });
      if (fresh.has(t)) found.at(-1).fresh++;
    }
    return found;
  }

  function logits(title, found) {
    const made = [];
    for (const [name, scores] of [["raises", found.up], ["lowers", found.down]]) {
      if (!scores.length) continue;
      const rows = grouped(scores, 2).map(([word, score]) => element("li", "", element("span", "token", visible(word)),
        element("span", "score", score.toFixed(1).replace("-", "−"))));
      const words = element("ul", "logits");
      words.append(element("li", "small", name), ...rows);
      made.push(words);
    }
    return made.length ? [element("div", "", ...(title ? [element("h3", "", title)] : []), ...made)] : [];
  }

  function effects(of, feature) {
    const made = [element("h2", "", "Effect on the next token")], known = of.known[feature];
    const fromIndex = of.index?.[feature]?.logits;
    if (!known?.new && !fromIndex) {
      made.push(element("p", "small", known ? "Not worked out: it does not write to the residual stream." :
        "Not worked out: it is not among the features that add most to this text."));
      return made;
    }
    const tables = [...logits(known?.carried ? "Where it is new" : "", known?.new || fromIndex),
      ...(known?.carried ? logits("By what it carried in this text, all parts added up", known.carried) : [])];
    const both = element("div", "columns", ...tables);
    const noise = data.noise ? ` (a mean score of ${data.noise.toFixed(1)} for the six strongest)` : "";
    made.push(...(tables.length ? [both] : []), element("p", "small", tables.length
      ? "The direct path only: its direction through the unembedding, with the weights of the final norm folded in and " +
        "its division by the length of the stream left out. The numbers are standard deviations from the mean of all " +
        `tokens. A list is left out where 1 in 100 random directions does as much${noise}.`
      : `Nothing that can be told from noise: 1 in 100 random directions raises or lowers its strongest tokens as much${
        noise}. What it does goes through the blocks in between.`));
    if (known?.cosine !== undefined) {
      made.push(element("p", "small", "The cosine between what it writes where it is new and what it carried is " +
        `${known.cosine.toFixed(2).replace("-", "−")}.`));
    }
    return made;
  }

  function alike(of, feature) {
    const known = of.known[feature]?.similar || of.index?.[feature]?.similar;
    if (!known?.length) return [];
    const rows = grouped(known, 2).map(([other, cosine]) => element("li", "",
      row((cosine / 100).toFixed(2).replace("-", "−"), cosine / 100, link(of, other))));
    return [element("h2", "", "Similar features"), element("p", "small", "By the cosine of what they write."),
      element("ul", "similar source-list", ...rows)];
  }

  function fromIndex(of, feature) {
    const held = of.index?.[feature];
    if (!held) return [];
    const where = data.index.data, state = looksBack ? "New" : "Active";
    const list = folded("passages new", held.passages.map(([before, here, after, activity]) =>
      entry((activity / UNIT.activity).toFixed(1), element("span", "around", `…${visible(before)}`,
        element("b", "", visible(here)), `${visible(after)}…`))), SHOWN);
    const stay = looksBack ? `, carried at ${rate(held.carried / data.index.tokens)} more, for ${
      ((held.new + held.carried) / held.spans).toFixed(1)} tokens in a row on average` : "";
    const columns = element("div", "columns", element("div", "", ...list),
      element("div", "", histogram(held.histogram, held.largest / UNIT.activity, where)));
    return [element("h2", "", `In ${where}`), element("p", "",
      `${state} at ${rate(held.new / data.index.tokens)} of ${data.index.tokens.toLocaleString("en")} tokens (${
        count(held.new, "time")})${stay}. Most strongly at:`), columns];
  }

  function describeFeature(of, feature) {
    const isNew = of.fresh.get(feature) || [], isCarried = of.carried.get(feature) || [];
    const newAt = new Set(isNew.map(([t]) => t)), only = isCarried.filter(([t]) => !newAt.has(t));
    const back = element("a", "", "← back to the text");
    back.href = `#token-${kept + 1}`;
    const total = n - leftOut.size, chart = element("div", "strip"), carries = of === main && looksBack;
    const title = element("h1", "", `Feature #${feature} `, ...called(of, feature).flatMap((word) => [token(word), " "]));
    const made = [element("p", "back", back, element("span", "small", " (Escape)")), title];
    if (of === beside) made.push(element("p", "job", `of ${of.name}, the per-token SAE`));
    else made.push(labelField(feature));
    const where = carries ? [element("span", "is-new", `New at ${isNew.length}`), ` of ${total} tokens of this text (${
      rate(isNew.length / total)}); `, element("span", "is-carried", `only carried at ${only.length}`),
      ` others (${rate(only.length / total)}), with ${share(data.threshold, 0)} or more of c each, the vector that is ` +
      "carried."] : [element("span", "is-new", `Active at ${isNew.length}`), ` of ${total} tokens of this text (${
      rate(isNew.length / total)}).`];
    made.push(element("p", "", ...where));
    if (isNew.length || isCarried.length) {
      made.push(chart);
      const columns = element("div", "columns");
      columns.append(element("div", "", element("h2", "", "Most active"),
        ...passages("new", isNew, (value) => (value / UNIT.activity).toFixed(1))));
      if (carries) {
        columns.append(element("div", "", element("h2", "", "Only carried"), ...(only.length
          ? passages("carried", only, (value) => share(value)) : [element("p", "small", "nowhere in this text")])));
      }
      made.push(columns);
      const found = stretches(isNew, isCarried).sort((a, b) => b.end - b.begin - (a.end - a.begin));
      if (carries && found.length) {
        made.push(element("h2", "", "Where it begins and ends"), element("p", "small",
          `${count(found.length, "stretch", "stretches")} of this text, the longest first: from where it is new or first ` +
          "carried to where it ends, and at how many tokens it is new."), ...folded("passages stretches",
          found.map(({ begin, end, fresh }) => entry(`${count(end - begin, "token")}, ${fresh} new`, passage(begin, end))),
          STRETCHES));
      }
      if (isNew.length && !of.index?.[feature]) made.push(histogram(...counted(isNew), "this text"));
    }
    made.push(...fromIndex(of, feature), ...alike(of, feature), ...effects(of, feature));
    featurePage.replaceChildren(...made);
    strip = chart.isConnected ? timeline(chart, `Where feature ${feature} is`, of, [feature], false) : null;
  }

  // ---- labels that the reader writes ----

  const asGiven = JSON.stringify([...main.labels]);
  const changed = () => JSON.stringify([...main.labels]) !== asGiven;
  addEventListener("beforeunload", (event) => {
    if (changed()) event.preventDefault();
  });

  function labelField(feature) {
    const field = element("input", ""), save = element("a", "save small", "download labels.json, for the folder of the run");
    field.value = main.labels.get(feature) || "";
    field.maxLength = LONGEST_LABEL;
    field.placeholder = "what is it about?";
    field.id = "label";
    const refresh = () => {
      save.hidden = !changed();
      const sorted = [...main.labels].sort((a, b) => a[0] - b[0]).map(([number, label]) => [String(number), label]);
      const json = `{\n${sorted.map(([number, label]) => `  "${number}": ${JSON.stringify(label)}`).join(",\n")}\n}\n`;
      save.href = `data:application/json;charset=utf-8,${encodeURIComponent(json)}`;
    };
    save.download = "labels.json";
    field.addEventListener("input", () => {
      const label = field.value.replace(/[\p{Cc}\p{Zl}\p{Zp}]/gu, " ").trim();
      if (label) main.labels.set(feature, label);
      else main.labels.delete(feature);
      for (const one of document.querySelectorAll(`[data-feature="feature-${feature}"]`)) one.renamed?.();
      refresh();
    });
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") event.stopPropagation();
    });
    refresh();
    const name = element("label", "", "Label");
    name.htmlFor = "label";
    return element("p", "label-field", name, field, save);
  }

