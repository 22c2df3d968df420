"""YAML files of experiments: `gram_meta/` (CHC and meta-training), `datasets/` and `trainers/` (as in CoOp)."""
