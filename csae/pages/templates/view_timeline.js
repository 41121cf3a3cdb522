  // ---- timelines ----

  const ROW = 16;  // height in pixels; also in the style sheet
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // Draws rows of features of an SAE against positions into a container. named: with their names beside them.
  // Gives {draw, point}: to draw it again, and to show a position in it.
  function timeline(container, label, of, rows, named) {
    const { fresh, carried } = of;
    const canvas = element("canvas", ""), here = element("div", "here"), ticks = element("div", "ticks");
    const names = element("div", "names"), readout = element("p", "readout small");
    let at = kept, row = 0;
    for (const feature of rows) {
      names.append(link(of, feature, true));
    }
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-label", `${label}: arrow keys move, Enter opens the ${named ? "feature" : "token"}`);
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
      if (amount(fresh)) state.push(`${of === main && looksBack ? "new" : "active"}, ${activity}`);
      if (amount(carried)) state.push(`carried, ${share(amount(carried))} of c`);
      const goTo = element("a", "", `token ${t + 1}`);
      goTo.href = `#token-${t + 1}`;
      const passage = (from, to) => data.tokens.slice(Math.max(0, from), to).join("");
      const before = passage(t - 6, t), after = passage(t + 1, t + 6);
      readout.replaceChildren(goTo, ` …${visible(before)}`, token(piece(t)), `${visible(after)}…`, element("br", ""),
        ...(named ? [link(of, feature)] : [`#${feature}`]), `: ${state.join("; ") || "not present"}`);
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
      if (event.key === "Enter") location.hash = named && rows.length ? `${of.page}-${rows[row]}` : `token-${at + 1}`;
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

