"""Evaluators by name."""

from gram_meta.engine.builtin.evaluation.build import EVALUATOR_REGISTRY, build_evaluator
from gram_meta.engine.builtin.evaluation.evaluator import Classification, EvaluatorBase

__all__ = ["EVALUATOR_REGISTRY", "Classification", "EvaluatorBase", "build_evaluator"]
