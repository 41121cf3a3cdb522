"""The page of `csae view`: in a browser, with the keyboard, and offline."""

from __future__ import annotations

import copy
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import D_IN
from viewed import ABOUT, D_SAE, TEXT, fitted, page, pairs

from csae import ContextualSAE, TopKSAE
from csae.data.language_model import LanguageModel
from csae.pages.view import Window, view
from csae.pages.view_page import running_mean, write_view
from csae.sae import SAE


def test_one_file_that_fetches_nothing(tmp_path: Path, facts: dict[str, Any]) -> None:
    text = page(tmp_path / "view.html", facts)
    names = {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}  # namespaces are names
    assert set(re.findall(r"https?://[^\s\"'<>)]+", text)) <= names
    assert not re.search(r"\ssrc=|<link|<iframe|@import|url\((?!#)|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    assert all(reference.startswith("#") for reference in re.findall(r"href=\"([^\"]*)", text))
    assert text == page(tmp_path / "again.html", facts), "the same facts should give the same page"


def test_text_never_becomes_markup(tmp_path: Path, facts: dict[str, Any]) -> None:
    nasty = copy.deepcopy(facts)
    nasty["tokens"][3] = "</script><script>alert(1)</script>\u2028<!--"
    text = page(tmp_path / "view.html", nasty)
    assert text.count("<script") == 2
    assert "alert(1)</" not in text
    assert "<h1>mill &amp; &lt;b&gt;.txt</h1>" in text
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    assert json.loads(data[1]) == nasty | {"about": ABOUT, "index": None, "labels": {}}


def test_what_the_page_says(tmp_path: Path, facts: dict[str, Any], per_token: SAE, windows, tiny_lm) -> None:
    text = " ".join(re.sub(r"<[^>]+>", "", page(tmp_path / "view.html", facts)).split())
    percent = f"{100 * facts['figures']['fvu']:.1f} %"
    assert f"Of this text’s variance it leaves {percent} unexplained (FVU); " in text
    assert "goes on beyond the 10 tokens of those that it was trained on. topk, the per-token SAE beside it" in text
    assert "a new window: nothing is carried over" in text
    alone = view(per_token, windows[:1], tiny_lm)
    text = page(tmp_path / "view.html", alone, beside=None, trained_on=None, whole=False)
    assert "tokens, where the text was cut" in text
    assert "a new window: nothing" not in text
    assert "said again" in text


def test_size(tmp_path: Path, tiny_lm: LanguageModel) -> None:
    """4,000 tokens and k = 32 are under 5 MB."""
    torch.manual_seed(0)
    n, times = 500, 8
    windows = [Window(torch.randint(5, 300, (n,)), torch.randn(n, D_IN), torch.arange(n) > 0)]
    sae = fitted(ContextualSAE(D_IN, D_SAE, 32, n_heads=2, d_head=4, d_value=6), windows)
    facts = view(sae, windows, tiny_lm, 256, fitted(TopKSAE(D_IN, D_SAE, 32), windows))
    # The same text some times over.
    parts = [
        [number + at * n * (i % 3 == 0) for i, number in enumerate(p)] for at in range(times) for p in facts["parts"]
    ]
    for name in ("tokens", "new", "carried", "gathered", "rest", "others", "remainder", "c", "missed"):
        facts[name] = facts[name] * times
    facts["parts"], facts["cuts"] = parts, list(range(n, n * times, n))
    for name in ("new", "missed"):
        facts["beside"][name] = facts["beside"][name] * times
    facts["features"] = {str(f): facts["features"]["0"] for f in range(4000)}
    assert 1_000_000 < len(page(tmp_path / "view.html", facts).encode()) < 5_000_000


def test_running_mean() -> None:
    assert running_mean([0, 3, 6, 0, 0], 3) == pytest.approx([1.5, 3, 3, 2, 0])
    assert running_mean([2], 15) == [2]


# ---- in a browser ----

STEPS = """
<script>
addEventListener("load", async () => {
  const seen = [];
  const $ = (selector) => document.querySelector(selector);
  const note = (name, value) => seen.push([name, value]);
  const settled = () => new Promise((resolve) => setTimeout(resolve, 50));
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  try {
    await settled();
    note("width", innerWidth);
    note("wide", document.documentElement.scrollWidth - innerWidth);
    note("tokens", document.querySelectorAll("#text .t").length);
    const painted = (canvas) => {
      const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
      let count = 0;
      for (let i = 3; i < pixels.length; i += 4) count += pixels[i] > 20;
      return count;
    };
    note("lines", [...document.querySelectorAll(".here")].map((line) => line.hidden));
    note("painted", [...document.querySelectorAll("canvas")].map(painted));
    $("#text .t[tabindex='0']").focus();
    press("Home");
    note("home", document.activeElement.dataset.at);
    note("left out", $("#detail").textContent);
    for (let i = 0; i < TOKEN; i++) press("ArrowRight");
    note("at", document.activeElement.dataset.at);
    const amounts = (selector) => [...document.querySelectorAll(`${selector} .amount`)].map((of) => of.textContent);
    note("parts", amounts("#parts"));
    note("by feature", amounts("#by-feature"));
    note("sum by feature", [...document.querySelectorAll("#sum-by-feature > *")].map((line) => line.textContent));
    note("sum", [...document.querySelectorAll("#sum > *")].map((line) => line.textContent));
    note("sources", [...document.querySelectorAll("#text .source")].map((span) => span.dataset.at));
    press("Enter");
    const link = document.activeElement.getAttribute("href");
    note("link", link);
    press("Escape");
    note("escaped", document.activeElement.dataset.at);
    location.hash = link;
    await settled();
    note("feature", [$("#reading").hidden, $("#feature").hidden, $("#feature h1").textContent]);
    note("passages", [...document.querySelectorAll("#feature .passages.new a")].map((a) => a.textContent));
    note("held out", $("#feature").textContent);
    note("bars", [...document.querySelectorAll("#feature .bars i")].map((bar) => bar.title));
    $("#feature details.more").open = true;
    await settled();
    note("all passages", document.querySelectorAll("#feature .passages.new a").length);
    note("similar", [...document.querySelectorAll("#feature .similar a")].map((a) => a.hash));
    const field = $("#label");
    note("label", field.value);
    field.value = "  of <b>mills ";
    field.dispatchEvent(new InputEvent("input", { bubbles: true }));
    note("download", [$("a.save").hidden, $("a.save").download, decodeURIComponent($("a.save").href)]);
    note("wide feature", document.documentElement.scrollWidth - innerWidth);
    press("Escape");
    await settled();
    note("back", [$("#reading").hidden, $("#feature").hidden, document.activeElement.dataset.at]);
    const canvas = $("#timeline canvas");
    canvas.focus();
    canvas.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    note("readout", $("#timeline .readout").textContent);
    press("Enter");
    await settled();
    note("row", $("#feature h1").textContent);
    location.hash = $("#beside .names a").hash;
    await settled();
    note("beside", $("#feature").textContent);
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "/", bubbles: true }));
    note("searching", document.activeElement.id);
    const find = (words) => {
      $("#query").value = words;
      $("#query").dispatchEvent(new FocusEvent("focus"));
      return [...document.querySelectorAll("#results > li")].map((of) => [of.className, of.querySelector("a")?.hash,
        of.textContent]);
    };
    for (const words of ["#7", "mills", "the lower", "promotes mill", "lowers mill", "no such words"]) {
      note(`find ${words}`, find(words));
    }
    note("wide results", document.documentElement.scrollWidth - innerWidth);
    find("mill");
    press("ArrowDown");
    note("first result", document.activeElement.hash);
    press("Escape");
    note("results", $("#results").hidden);
    location.hash = "find-mill";
    await settled();
    note("found", [$("#query").value, $("#results").hidden]);
    location.hash = "token-3";
    await settled();
    note("token", document.activeElement.dataset.at);
    const from = $("#text .t[data-at='9']");
    from.dispatchEvent(new PointerEvent("pointerover", { pointerType: "mouse", bubbles: true }));
    note("hover", $("#detail h3").textContent);
    note("focusable", [...document.querySelectorAll("a")].every((a) => a.href && a.textContent.trim()));
  } catch (error) {
    note("error", String(error));
  }
  parent.postMessage(JSON.stringify(seen), "*");
});
</script>
"""
# A window of chromium is 500 pixels wide at least, a frame in it as wide as is asked for.
FRAME = """<body><pre id="seen"></pre>
<script>addEventListener("message", (event) => { document.getElementById("seen").textContent = event.data; });</script>
<iframe src="view.html" width="WIDTH" height="900"></iframe></body>
"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(tmp_path: Path, facts: dict[str, Any], width: int) -> None:
    t = facts["cuts"][0] - 1
    number = facts["new"][t][0]
    held = {"new": 12, "carried": 3, "spans": 10, "largest": 250, "histogram": [9, 0, 0, 3], "words": [" mill", "\n"]}
    held |= {"passages": [["before", " mill", " after", 250], ["", "\n", "", 100]], "similar": [1, 50]}
    held |= {"logits": {"up": [], "down": []}}
    index = {"data": "all mills", "tokens": 1000, "names": {"3": [" mill"]}, "features": {str(number): held}}
    write_view(tmp_path / "view.html", ABOUT, facts, index=index, labels={number: "mills", 4: "dams"})
    text = (tmp_path / "view.html").read_text(encoding="utf-8")
    (tmp_path / "view.html").write_text(text.replace("</body>", STEPS.replace("TOKEN", str(t)) + "</body>"))
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'chromium'}", "--window-size=1400,1000"]
    done = subprocess.run(
        [*command, (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    seen = dict(json.loads(html.unescape(found[1])))
    assert "error" not in seen, seen["error"]
    assert seen["width"] == width
    assert seen["wide"] <= 0, "the page scrolls sideways"
    assert seen["wide feature"] <= 0
    assert seen["tokens"] == len(facts["tokens"])
    assert seen["lines"] == [True, True], "a line could be taken for something in the text"
    assert len(seen["painted"]) == 2
    assert min(seen["painted"]) > 500
    assert seen["home"] == "0"
    assert "Left out" in seen["left out"]
    assert seen["at"] == seen["escaped"] == str(t)

    # The parts that are listed, and the others, are all of c; and the page says what they miss.
    number = [float(part.replace("−", "-").removesuffix(" %")) for part in seen["parts"]]
    assert number == [part / 100 for part in facts["parts"][t][2::3]]
    others, n_others, total, _, remainder, _ = seen["sum"]
    assert n_others == f"{facts['others'][t][0]} other parts"
    assert sum(number) + float(others.replace("−", "-").removesuffix(" %")) == pytest.approx(
        float(total.removesuffix(" %")), abs=0.005
    )
    assert float(total.removesuffix(" %")) == pytest.approx(100, abs=0.07)
    assert float(remainder.replace("−", "-")) == facts["remainder"][t]
    assert {int(j) for j in seen["sources"]} <= set(facts["parts"][t][0::3])

    by_feature = [float(part.removesuffix(" %")) for part in seen["by feature"]]
    assert by_feature == [round(part / 100, 1) for part in facts["carried"][t][1::2]]
    rest, n_rest, total, _ = seen["sum by feature"]
    assert n_rest.startswith(f"{facts['rest'][t][0]} other feature")
    assert total == "100.0 %"
    assert sum(facts["carried"][t][1::2]) / 100 + float(rest.replace("−", "-").removesuffix(" %")) == pytest.approx(
        100, abs=0.2
    )

    feature = facts["new"][t][0]
    assert seen["link"] == f"#feature-{feature}"
    assert seen["feature"][:2] == [True, False]
    assert seen["feature"][2].startswith(f"Feature #{feature} mill ")
    assert "↵" not in seen["feature"][2], "blanks are no name where there is another"
    about = "In all mills New at 1.20 % of 1,000 tokens (12 times), carried at 0.30 % more, for 1.5 tokens in a row"
    assert about in seen["held out"].replace("In all millsNew", "In all mills New")
    assert "2.5…before mill after…1.0…↵…" in seen["held out"]
    assert seen["bars"] == [
        "0.0 to 0.6: 9 tokens",
        "0.6 to 1.3: 0 tokens",
        "1.3 to 1.9: 0 tokens",
        "1.9 to 2.5: 3 tokens",
    ]
    where = [i for i, new in enumerate(facts["new"]) if feature in new[::2]]
    plain = [i for i in where if facts["tokens"][i].strip()]
    strongest = max(plain, key=lambda i: pairs(facts["new"][i])[feature])
    assert facts["tokens"][strongest].strip() in seen["passages"][0]
    assert len(seen["passages"]) == min(8, len(where))
    assert seen["all passages"] == len(where)
    assert seen["similar"] == [f"#feature-{other}" for other in facts["features"][str(feature)]["similar"][::2]]
    assert seen["label"] == "mills"
    labels = {"4": "dams", str(feature): "of <b>mills"}
    hidden, name, url = seen["download"]
    assert (hidden, name) == (False, "labels.json")
    assert json.loads(url.partition(",")[2]) == labels
    assert seen["back"] == [False, True, str(t)]
    assert f"token {t + 2}" in seen["readout"]
    assert seen["row"].startswith(f"Feature #{facts['rows'][0]} ")
    assert seen["token"] == "2"
    assert f"token 10 of {len(facts['tokens'])}" in seen["hover"]
    assert seen["focusable"]

    assert f"Feature #{facts['beside']['rows'][0]} " in seen["beside"]
    assert "of topk, the per-token SAE" in seen["beside"]
    assert seen["searching"] == "query"
    assert seen["find #7"][:2] == [["title", None, "Feature"], ["", "#feature-7", seen["find #7"][1][2]]]
    assert ["title", None, "Labels"] in seen["find mills"]
    assert f"#feature-{feature}" in [link for _, link, _ in seen["find mills"]]
    titles = [title for kind, _, title in seen["find the lower"] if kind == "title"]
    assert titles[0].startswith("New here at “the lower”")
    assert titles[-1].startswith("In the text")
    shown = [link for _, link, _ in seen["find the lower"] if link]
    begins = TEXT.lower().index("the lower")
    ends = [sum(map(len, facts["tokens"][: i + 1])) for i in range(len(facts["tokens"]))]
    assert f"#token-{next(i for i, end in enumerate(ends) if end > begins) + 1}" in shown
    raising = [link for _, link, _ in seen["find promotes mill"][1:]]
    assert f"#feature-{facts['raises'][' mill'][0]}" in raising if " mill" in facts["raises"] else raising is not None
    assert seen["find lowers mill"]
    assert seen["find no such words"] == [["small", None, "nothing found"]]
    assert seen["wide results"] <= 0
    assert seen["first result"].startswith("#")
    assert seen["results"] is True
    assert seen["found"] == ["mill", False]
