"""`gram bench`: many trainers, datasets and seeds over the paper's protocols, by several processes, resumable."""
