"""SAEs of other papers, written here from the papers, to compare the contextual SAE with.

Each is a `csae.sae.SAE`, so `csae.train` and `csae.evaluate` work with it. Its `note` says in a line what its figures
don't show.
"""

from __future__ import annotations

from csae.bench.baselines.batch_topk import BatchTopKSAE
from csae.bench.baselines.temporal_features import TemporalFeatureSAE
from csae.bench.baselines.temporal_sae import TemporalSAE
from csae.sae import SAE

BASELINES: dict[str, type[SAE]] = {
    "batch-topk": BatchTopKSAE,
    "temporal-features": TemporalFeatureSAE,
    "temporal-sae": TemporalSAE,
}
