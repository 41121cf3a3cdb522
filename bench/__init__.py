"""What things cost, measured, beside what the hardware allows and what others take: `csae bench`.

cases: what is measured, its reference and its floor. ours, plain, peers, attention: the implementations. check: none
is timed that gives another result. harness: the run. report: table, JSON, plot, comparison. growth: cost against
d_sae and k. memory: a training step's peak by itself. demo_figure: the README's figure.

Needs torch and numpy alone; matplotlib for plots, and the peers where they are to be measured.
"""

if __name__ != "csae.bench":
    raise ImportError(f"{__name__} is imported as csae.bench: a module under two names is two modules")
