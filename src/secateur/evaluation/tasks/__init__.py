"""Tasks with right and wrong answers, through the field's own harness, lm-eval."""

from secateur.evaluation.tasks.results import Score, TaskEvaluation, TaskScores, evaluate_tasks

__all__ = ["Score", "TaskEvaluation", "TaskScores", "evaluate_tasks"]
