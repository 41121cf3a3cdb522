"""Predict what each kernel, op and training step takes on an H200, without a GPU.

    python -m csae.bench.predict [--shapes A B C]     prints a table
    python -m csae.bench.predict --write              and writes bench/predictions.json and kernels/PREDICTED.md

A prediction is made of three things: the instructions of the kernels' machine code for sm_90, by loop (sass.py); how
often each loop runs on random data, and what is loaded and stored, counted in Triton's interpreter (trips.py); what a
step launches, found by running it on tensors without numbers (launches.py). machine.py has the machine's rates,
model.py the times. What is counted is kept in counted.json, until a kernel's source changes.
"""

from __future__ import annotations

import argparse
import json

from ..data import SHAPES
from . import table, written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["A", "B", "C"])
    parser.add_argument("--count", action="store_true", help="count all again")
    parser.add_argument("--write", action="store_true", help="write predictions.json and PREDICTED.md")
    args = parser.parse_args()
    for name in args.shapes:
        written.count(name, args.count)
        new = written.predict(name)
        found = written.predictions()
        written.put(found, name, new)
        print(*table.short(found, name), sep="\n", flush=True)
        if args.write:
            written.PREDICTIONS.write_text(json.dumps(found, indent=1) + "\n")
            table.PREDICTED.write_text(table.markdown(found))


if __name__ == "__main__":
    main()
