"""The benchmark, `csae bench`: time and memory beside the hardware's limit and other implementations.

cases                          what is measured, with its reference and its floor
ours, plain, peers, attention  the implementations
check                          compares results: an implementation with another result is not timed
harness                        the run
report                         table, JSON, plot, comparison
growth                         cost against d_sae and k
memory                         peak memory of a training step
gpu, tune, sanitize, targets   what a GPU is needed for
peer_tests                     other libraries' own tests under our patch
demo_figure                    the README's figure
scale, scale_*                 what a step sends between processes, beside data parallelism

Needs torch and numpy alone; matplotlib for plots, and the peers where they are to be measured.
"""

if __name__ != "csae.bench":
    raise ImportError(f"{__name__} is imported as csae.bench: a module under two names is two modules")
