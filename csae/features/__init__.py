"""Finding a feature: an index of where each is new, is carried and ends, and the labels that people write.

`csae features` builds an index, and it and `csae view` search it. Its format is described in `csae.features.index`.
"""
