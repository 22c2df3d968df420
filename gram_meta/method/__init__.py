"""The method of the paper, in reading order: prompts, regulator, bilevel, tasks, episodes, meta_trainer, evaluation, apply."""
