  // ---- which page is shown: #feature-12, #beside-12, #token-57, #find-words, or the reading ----

  let came = null;  // what had the focus before the page of a feature
  let scrolled = 0;

  function route() {
    hideResults();
    if (location.hash.startsWith("#find-")) {
      query.value = decodeURIComponent(location.hash.slice("#find-".length));
      query.focus();
      showResults();
      return;
    }
    const [, kind, number] = location.hash.match(/^#(feature|beside|token)-(\d+)$/) || [];
    const of = { feature: main, beside }[kind];
    if (of && Number(number) < of.d_sae) {
      if (!reading.hidden) [came, scrolled] = [document.activeElement, scrollY];
      reading.hidden = true;
      featurePage.hidden = false;
      describeFeature(of, Number(number));
      scrollTo({ top: 0, behavior: "instant" });
      featurePage.focus({ preventScroll: true });
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
  timelines.push(timeline($("timeline"), "Features along the text", main, data.rows, true));
  if (beside) timelines.push(timeline($("beside"), "Features of the per-token SAE", beside, data.beside.rows, true));
  route();
