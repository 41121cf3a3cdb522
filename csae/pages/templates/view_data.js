  // What the page holds, and how features and tokens are called.
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const [text, detail, reading, featurePage] = ["text", "detail", "reading", "feature"].map($);
  const UNIT = { share: 10000, activity: 100 };  // what whole numbers in the data are parts of
  const NAMES = 3;
  const n = data.tokens.length;
  const leftOut = new Set(data.left_out), cuts = new Set(data.cuts);
  const looksBack = data.figures.arch === "contextual";

  // [a, b, ...] -> the list cut in pieces of `size` numbers.
  const grouped = (flat, size) =>
    Array.from({ length: flat.length / size }, (_, i) => flat.slice(i * size, (i + 1) * size));
  const share = (number, digits = 1) => `${(100 * number / UNIT.share).toFixed(digits)} %`.replace("-", "−");
  const rate = (of) => `${(100 * of).toFixed(of < 0.001 ? 3 : of < 0.1 ? 2 : 1)} %`;
  const count = (number, one, many = `${one}s`) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
  const piece = (t) => data.tokens[t] || "…";
  // Blanks and rulers, as csae.features.filler has them: they tell nothing of what a feature is about.
  const isFiller = (word) => !word.trim() || /^\s*([\p{P}\p{S}])\1{2,}\s*$/u.test(word);

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
  const strongest = (pairs) => [...pairs].sort((a, b) => b[1] - a[1] || a[0] - b[0]);
  const newest = (pairs) => strongest(pairs).filter(([t]) => !isFiller(data.tokens[t]));

  // The SAEs of the page: the one that is read, and the one beside it. Features of each have links and pages.
  const main = { page: "feature", name: "", fresh: byFeature(data.new), carried: byFeature(data.carried),
    known: data.features, d_sae: data.figures.d_sae, index: data.index?.features, labels: new Map() };
  const beside = data.beside && { page: "beside", name: data.about.beside, fresh: byFeature(data.beside.new),
    carried: new Map(), known: data.beside.features, d_sae: data.beside.figures.d_sae, labels: new Map() };
  for (const [feature, label] of Object.entries(data.labels || {})) main.labels.set(Number(feature), label);

  // The tokens at which a feature is most active, each once; blanks and rulers only where there is nothing else.
  function words(pairs) {
    const found = new Set();
    for (const [t] of newest(pairs)) {
      found.add(data.tokens[t].trim());
      if (found.size === NAMES) break;
    }
    if (!found.size && pairs.length) found.add(piece(strongest(pairs)[0][0]).trim().slice(0, 3) || "blanks");
    return [...found];
  }

  // What a feature is called by: the tokens at which it is most active in all indexed text, where that is known.
  function called(of, feature) {
    const known = of.index?.[feature]?.words || (of === main && data.index?.names[feature]);
    const plain = (known || []).filter((word) => !isFiller(word)).map((word) => word.trim());
    return plain.length ? [...new Set(plain)].slice(0, NAMES) : words(of.fresh.get(feature) || []);
  }

  // #12 its label, or its words.
  function nameOf(of, feature, plain = false) {
    const number = element("span", "number", `#${feature}`), label = of.labels.get(feature);
    if (label) return [number, element("span", "label", label)];
    if (plain) return [number, element("span", "words", called(of, feature).map(visible).join(" "))];
    return [number, ...called(of, feature).flatMap((word, at) => [at ? " " : "", token(word)])];
  }

  function link(of, feature, plain = false) {
    const made = element("a", "feature", ...nameOf(of, feature, plain));
    made.href = `#${of.page}-${feature}`;
    if (of === main) made.renamed = () => made.replaceChildren(...nameOf(of, feature, plain));
    made.dataset.feature = `${of.page}-${feature}`;
    return made;
  }

