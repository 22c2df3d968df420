"""GRAM: Gradient-Regulated Meta-Prompt Learning for the Dassl/CoOp world.

An independent implementation of Li et al., "Gradient-Regulated Meta-Prompt Learning for Generalizable
Vision-Language Models" (ICCV 2023). `gram --help` lists what can be done with it.
"""

__version__ = "0.1.0"
