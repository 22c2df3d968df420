"""The method of the paper, in reading order.

prompts         text and visual prompts around frozen CLIP towers (Eq. 1, 2)
regulator       R^phi (Eq. 5, 6)
bilevel         the inner loop and the meta-objective (Eq. 4, 7, 10, 12)
tasks           meta-training tasks drawn from a hierarchy (Sec. 3.3)
episodes        from tasks to losses
memory_plan     how much of a batch goes through the towers at a time
outer           the outer loop (Eq. 8, 9)
meta_trainer    Algorithm 1; theta and phi are `meta_state`, its folder `meta_run`, its timing `profiling`
evaluation      adaptation on held-out tasks (Fig. 3b)
checkpoint      theta* and R^phi* in a file
apply           few-shot learning with them ("Testing" in Sec. 3.3); `dassl` does it in a Dassl trainer
"""
