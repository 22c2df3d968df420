"""`gram bench`: many trainers, datasets and seeds over the paper's protocols, by several processes, resumable.

matrix.py   the runs: commands of `gram`, their folders, and what each needs
emoji.py    the same on the emoji world, which is made first
pool.py     processes that run these commands, one per GPU or per share of the cores
runner.py   the loop: finished runs are skipped, failures are reported, and the other runs go on
times.py    durations as text
"""
