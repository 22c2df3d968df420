"""Cross-modal hierarchical clustering (CHC, Sec. 3.2): filter, topics, topic words, visual domains.

`cluster_pairs` (in `chc`) is what `gram cluster` runs; `Hierarchy` (in `hierarchy`) is its result.
"""
