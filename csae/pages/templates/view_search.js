  // ---- search ----

  const RESULTS = 10, RARE = 5;
  const query = $("query"), results = $("results");

  // Features that are new where a text stands in this text: [feature, their share of activity there], the best first.
  // The share counts for less where a feature is rare.
  function newAt(wanted) {
    const whole = data.tokens.join("").toLowerCase(), ends = [];
    let length = 0;
    for (const of of data.tokens) ends.push(length += of.length);
    const at = new Set(), begins = [];
    let t = 0;
    for (let found = whole.indexOf(wanted); found >= 0; found = whole.indexOf(wanted, found + wanted.length)) {
      while (ends[t] <= found) t++;
      begins.push(t);
      for (let of = t; of < n && (of === t || ends[of - 1] < found + wanted.length); of++) at.add(of);
    }
    const scores = [];
    for (const [feature, pairs] of main.fresh) {
      const total = pairs.reduce((sum, [, amount]) => sum + amount, 0);
      const here = pairs.reduce((sum, [position, amount]) => sum + (at.has(position) ? amount : 0), 0);
      if (here) scores.push([feature, here / total, here / total * pairs.length / (pairs.length + RARE)]);
    }
    return { begins, features: scores.sort((a, b) => b[2] - a[2]) };
  }

  // Features whose lists of raised (or lowered) tokens have a token: [feature, score].
  function moves(end, wanted) {
    const found = new Map(), same = (word) => word.trim().toLowerCase() === wanted;
    const add = (feature, score) => found.set(feature, Math.max(found.get(feature) || 0, Math.abs(score)));
    const look = (feature, list) => grouped(list || [], 2).forEach(([word, score]) => same(word) && add(feature, score));
    for (const [feature, effect] of Object.entries(main.known)) look(Number(feature), effect.new?.[end]);
    for (const [feature, held] of Object.entries(main.index || {})) look(Number(feature), held.logits?.[end]);
    for (const [word, list] of Object.entries(end === "up" ? data.raises : {})) {
      if (same(word)) grouped(list, 2).forEach(([feature, score]) => add(feature, score));
    }
    return [...found].sort((a, b) => b[1] - a[1]);
  }

  function indexed(wanted) {
    const found = [];
    for (const [feature, words] of Object.entries(data.index?.names || {})) {
      const at = words.findIndex((word) => word.trim().toLowerCase() === wanted);
      if (at >= 0) found.push([Number(feature), at]);
    }
    return found.sort((a, b) => a[1] - b[1]);
  }

  function search(asked) {
    const groups = [], wanted = asked.trim().toLowerCase();
    const group = (title, rows, all = rows.length) => rows.length && groups.push([all > RESULTS
      ? `${title} (${RESULTS} of ${all.toLocaleString("en")})` : title, rows.slice(0, RESULTS)]);
    const feature = (number, ...said) => [link(main, number), element("span", "small", ...said)];
    if (!wanted) return groups;
    const number = wanted.match(/^#?(\d+)$/);
    if (number && Number(number[1]) < main.d_sae) group("Feature", [feature(Number(number[1]))]);
    if (number && number[1] >= 1 && number[1] <= n) group("Token", [[passageLink(number[1] - 1)]]);
    const effect = wanted.match(/^(promotes|raises|lowers)[\s:]+['"]?(.*?)['"]?$/);
    if (effect) {
      const end = effect[1] === "lowers" ? "down" : "up", found = moves(end, effect[2].trim());
      group(`${end === "up" ? "Raise" : "Lower"} “${effect[2].trim()}”`, found.map(([of, score]) =>
        feature(of, ` ${score.toFixed(1)}`)));
      return groups;
    }
    const labelled = [...main.labels].filter(([, label]) => label.toLowerCase().includes(wanted));
    group("Labels", labelled.map(([of]) => feature(of)));
    const { begins, features } = newAt(wanted), state = looksBack ? "New" : "Active";
    group(`${state} here at “${asked.trim()}”`, features.map(([of, part]) =>
      feature(of, ` ${(100 * part).toFixed(0)} % of it`)), features.length);
    group(`${state} most at “${asked.trim()}” in ${data.index?.data}`, indexed(wanted).map(([of]) => feature(of)));
    group(`Raise “${asked.trim()}”`, moves("up", wanted).map(([of, score]) => feature(of, ` ${score.toFixed(1)}`)));
    group("In the text", begins.map((t) => [passageLink(t)]));
    return groups;
  }

  const passageLink = (t) => element("span", "passages new", passage(t));

  function showResults() {
    const groups = search(query.value);
    results.replaceChildren(...groups.flatMap(([title, rows]) => [element("li", "title", title),
      ...rows.map((content) => element("li", "", ...content))]));
    if (!groups.length && query.value.trim()) results.append(element("li", "small", "nothing found"));
    results.hidden = !results.children.length;
  }

  let waiting = 0;
  query.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(showResults, 120);
  });
  query.addEventListener("focus", showResults);
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    showResults();
    const first = results.querySelector("a");
    if (first) location.hash = first.hash;
  });
  $("search").addEventListener("keydown", (event) => {
    const links = [...results.querySelectorAll("a")], step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step && !results.hidden) (links[links.indexOf(document.activeElement) + step] || query).focus();
    else if (event.key === "Escape") hideResults();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  function hideResults() {
    results.hidden = true;
    if ($("search").contains(document.activeElement)) document.activeElement.blur();
  }
  results.addEventListener("click", (event) => {
    if (event.target.closest("a")) hideResults();
  });
  document.addEventListener("pointerdown", (event) => {
    if (!$("search").contains(event.target)) results.hidden = true;
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest?.("input")) return;
    event.preventDefault();
    query.focus();
    query.select();
  });

