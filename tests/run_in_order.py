"""Runs `csae` commands one after another: `python run_in_order.py < commands.json`, a list of [name, code, arguments].

Each is a process of its own, forked from this one, which has imported what they need: an import takes longer than most
of them. The first that fails ends it.
"""

import importlib
import json
import os
import sys

OURS = ("csae.cli", "csae.train", "csae.evaluate", "csae.export", "csae.bench.evidence")
OTHERS = ("torch._dynamo", "transformers")


def main() -> None:
    for name in OURS + OTHERS:
        importlib.import_module(name)
    for name, code, arguments in json.load(sys.stdin):
        if os.fork() == 0:
            sys.argv = ["csae", *arguments]
            exec(code, {"__name__": "__main__"})
            return
        _, status = os.wait()
        if status:
            sys.exit(f"{name}: it ended with status {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    main()
