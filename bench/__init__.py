"""What the ops and a training step cost, measured: `python -m bench.ops`, `python -m bench.memory`."""
