"""What the contextual SAE is compared with: SAEs of other papers, written here from the papers.

Each is a `csae.sae.SAE`, so that `csae.train` and `csae.evaluate` take it as they take ours. Its `note` says in a
line what its figures do not show.
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
