"""For `make docs`: links out of docs/, which work in the repository, are mended for the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "bench" / "results"


def on_files(files: Files, config: Any) -> Files:
    """Figures of bench/results/ go into the site."""
    for path in sorted(path for path in RESULTS.rglob("*") if path.suffix in (".svg", ".png")):
        files.append(File.generated(config, f"figures/{path.relative_to(RESULTS)}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Of other links to files outside of docs/ the text stays."""
    markdown = re.sub(r"(!\[[^]]*\]\()\.\./bench/results/", r"\1figures/", markdown)
    return re.sub(r"\[([^]]+)\]\((?:\.\./)+[^)]*\)", r"\1", markdown)
