"""What a page takes along of an index of features: as much as its size allows, so that it needs no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from typing import Any

from csae.features.index import FeatureIndex
from csae.features.places import ACTIVITY

BYTES = 4_000_000  # of JSON, for features in full
NAMED = 20_000  # features that can be searched by their tokens
PASSAGES = 20
WORDS = 3


def from_index(index: FeatureIndex, features: Sequence[int], limit: int = BYTES) -> dict[str, Any]:
    """The features of a text, and then the most frequent others, until `limit` bytes are full; JSON as it is.

    features: those of the text. Returns
        data, tokens: what the text of the index is called, and how many of its tokens count.
        names: feature -> the tokens at which it is new most, for the NAMED most frequent.
        features: feature -> {"new", "carried", "spans", "histogram", "logits"} as `csae.features.index.Feature` has
            them; largest: in 1/ACTIVITY; words: the tokens at which it is new most; passages: [before, token, after,
            activity in 1/ACTIVITY]; similar: [feature, cosine in hundredths, ...].
    """
    known = [(number, [word for word, _ in words[:WORDS]]) for number, _, words in index.features()]
    found: dict[str, Any] = {}
    size = 0
    here = set(features)
    for number in chain(features, (number for number, _ in known if number not in here)):
        feature = index.feature(number, PASSAGES)
        if feature is None:
            continue
        content = {
            "new": feature.new,
            "carried": feature.carried,
            "spans": feature.spans,
            "largest": round(feature.largest * ACTIVITY),
            "histogram": feature.histogram,
            "words": [word for word, _ in feature.words],
            "passages": [
                [passage.before, passage.token, passage.after, round(passage.amount * ACTIVITY)]
                for passage in feature.passages
            ],
            "logits": feature.logits,
            "similar": [part for other, cosine in feature.similar for part in (other, round(100 * cosine))],
        }
        size += len(json.dumps(content, ensure_ascii=False).encode())
        if size > limit:
            break
        found[str(number)] = content
    names = {str(number): words for number, words in known[:NAMED]}
    return {"data": index.about["data"], "tokens": index.n_tokens, "names": names, "features": found}
