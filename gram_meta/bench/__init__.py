"""`gram bench`: many trainers, datasets and seeds over the paper's protocols, by several processes, resumable.

matrix.py   what is to be run: commands of `gram`, their folders, and what each is built upon
emoji.py    the same on the emoji world, which is made first
pool.py     processes that run these commands, one per GPU or per share of the cores
runner.py   the loop: what is finished is skipped, what fails is reported, and the others go on
"""
