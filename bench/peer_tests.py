"""Another library's own tests, without `csae.patch` and with it: a test that passes without must pass with it.

    python -m csae.bench.peer_tests sae_lens CHECKOUT

CHECKOUT is the library's repository, at the version that is installed or near it. Its tests run against the installed
package, twice, each in a process of its own. A test that fails without the patch can't be compared (no network, no
CUDA, a test of another version): it is named, with the reason, as are those that the library skips. Exits with 1 where
a test that passes without the patch doesn't with it, or where none could be compared.

Needs pytest beside the library. HF_HUB_OFFLINE=1 spares the wait for a network that isn't there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from csae.errors import UserError

# Where each library tests the classes that are patched, and what is built on them. A version may lack some.
TESTS = {
    "sae_lens": (
        "tests/saes/test_topk_sae.py",
        "tests/saes/test_batchtopk_sae.py",
        "tests/saes/test_matryoshka_batchtopk_sae.py",
        "tests/saes/test_sae.py",
        "tests/saes/test_transcoder.py",
        "tests/refactor_compatibility/test_topk_sae_equivalence.py",
        "tests/training/test_sae_trainer.py",
        "tests/training/test_activation_scaler.py",
        "tests/analysis/test_hooked_sae.py",
        "tests/test_llm_sae_training_runner.py",
    ),
    "sparsify": ("tests/test_encode.py", "tests/test_decode.py"),
    "dictionary_learning": (
        "tests/unit/test_dictionary.py",
        "tests/test_pytorch_end_to_end.py",
        "tests/test_end_to_end.py",
    ),
}

PASSED = "passed"

# How much of an error's first line is shown.
MOST_CHARACTERS = 160

# Words in the text of a failure that show what this machine lacks.
_MISSING = {
    "needs the network": (
        "couldn't connect",
        "cannot reach",
        "max retries exceeded",
        "name resolution",
        "localentrynotfound",
        "offlinemode",
        "offline mode",
        "connecterror",
        "connectionerror",
        "can't load the configuration",
    ),
    "needs CUDA": ("cuda", "nvidia"),
}


class Result(NamedTuple):
    """What became of a test: "passed", "skipped" or "failed", and why."""

    outcome: str
    reason: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, and print the table. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m csae.bench.peer_tests", description=__doc__.splitlines()[0])
    parser.add_argument("library", choices=TESTS)
    parser.add_argument("checkout", type=Path, help="its repository, with its tests")
    given = parser.parse_args(arguments)
    try:
        without = run_tests(given.library, given.checkout, patched=False)
        patched = run_tests(given.library, given.checkout, patched=True)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    text, failures = table(without, patched)
    print(text)
    return 1 if failures or not _passed(without) else 0


def run_tests(library: str, checkout: Path, patched: bool) -> dict[str, Result]:
    """The results of a library's own tests, by name, in a process of their own."""
    files = [name for name in TESTS[library] if (checkout / name).is_file()]
    if not files:
        raise UserError(f"{checkout}: none of {library}'s tests is there: {', '.join(TESTS[library])}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Away from the checkout: its package must not take the place of the one that is installed.
        shutil.copytree(checkout / "tests", folder / "tests")
        report = folder / "report.xml"
        plugin = ["-p", f"{__package__}.peer_tests", "--csae-patch", library] if patched else []
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", *options, *plugin, *files]
        paths = [os.path.abspath(path or os.curdir) for path in sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if not report.is_file():
            raise UserError(f"pytest wrote no report:\n{(done.stdout + done.stderr)[-2000:]}")
        return read_report(report)


def read_report(report: Path) -> dict[str, Result]:
    """The results in a file that pytest's --junitxml wrote."""
    results: dict[str, Result] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}".removeprefix("::")
        wrong = [part for part in case if part.tag in ("failure", "error")]
        left_out = case.find("skipped")
        if wrong:
            message = (wrong[0].get("message") or "").strip() + "\n" + (wrong[0].text or "")
            results[name] = Result("failed", _why(message))
        elif left_out is not None:
            results[name] = Result("skipped", (left_out.get("message") or "no reason given").splitlines()[0])
        else:
            results.setdefault(name, Result(PASSED, ""))
    return results


def table(without: dict[str, Result], patched: dict[str, Result]) -> tuple[str, list[str]]:
    """The table as text, and the tests that fail with the patch though they pass, or are skipped, without it."""
    passed = _passed(without)
    cannot = {name: result.reason for name, result in without.items() if result.outcome == "failed"}
    skipped = {name: result.reason for name, result in without.items() if result.outcome == "skipped"}
    none = Result("did not run", "")
    wrong = {name for name, result in patched.items() if result.outcome == "failed"} - cannot.keys()
    failures = [name for name in without if name in wrong or (name in passed and name not in _passed(patched))]
    lines = [" " * 18 + f"{'passed':>9}{'skipped':>9}{'not run':>9}{'failed':>9}"]
    for title, results, failed in (("without the patch", without, []), ("with the patch", patched, failures)):
        outcomes = [result.outcome for name, result in results.items() if name not in failed]
        counts = [outcomes.count(outcome) for outcome in (PASSED, "skipped", "failed")]
        lines.append(f"{title:<18}{counts[0]:>9}{counts[1]:>9}{counts[2]:>9}{len(failed):>9}")
    lines += _listed("skipped by the library", skipped)
    lines += _listed("not run: fails without the patch too", cannot)
    lines += _listed("FAILED with the patch only", {name: ": ".join(patched.get(name, none)) for name in failures})
    kept = len(set(passed) & set(_passed(patched)))
    lines += ["", f"{kept} of {len(passed)} tests that pass without the patch pass with it."]
    return "\n".join(lines), failures


def _passed(results: dict[str, Result]) -> list[str]:
    return [name for name, result in results.items() if result.outcome == PASSED]


def _listed(title: str, reasons: dict[str, str]) -> list[str]:
    return ["", f"{title}:", *(f"  {name}: {reason}" for name, reason in reasons.items())] if reasons else []


def _why(message: str) -> str:
    """A failure in one line: what this machine lacks, if that is the reason, and the error's first line."""
    first = message.splitlines()[0]
    for reason, signs in _MISSING.items():
        if any(sign in message.lower() for sign in signs):
            return f"{reason} ({first[:MOST_CHARACTERS]})"
    return first[:MOST_CHARACTERS]


# --- this module as a pytest plugin: `-p csae.bench.peer_tests --csae-patch LIBRARY` --------------------------------


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--csae-patch", choices=tuple(TESTS), required=True)


def pytest_configure(config: Any) -> None:
    """Patch before the first test module is imported, and after the tests' own conftest.py has set what it sets."""
    import pytest

    from csae import patch

    try:
        patch(config.getoption("--csae-patch"))
    except UserError as error:
        raise pytest.UsageError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
