"""Image-text pairs: readers (`readers`, `images`), Sentence-BERT (`sentences`), and the store of their
features.

`embed_pairs` (in `embed`) is what `gram embed` runs; `PairStore` (in `store`) is what it leaves behind.
"""
