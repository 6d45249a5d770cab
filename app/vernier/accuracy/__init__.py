"""The one place where accuracy is measured: a candidate's outputs against the reference's, or against labels.

The build's gate, the self-test on golden vectors and the live monitor all call this package, so a number
means the same everywhere. The first axis of every array is the sample. Two rules hold for every metric:
a sample with a NaN or an infinity gets the worst value there is and so fails every budget, and
comparing nothing is an error (AccuracyError).

Distances (0 is equal):     rel_l2, max_abs, rel_spread
Similarities (1 is equal):  cosine, equal, top1, top5 …, kendall, ndcg
With labels:                accuracy, auc, f1 (bigger is better); log_loss, rmse, wer, cer (smaller is better)
"""

from vernier.accuracy.decisions import decisions, flip_rate
from vernier.accuracy.divergence import (
    DISTANCES,
    SIMILARITIES,
    Comparison,
    compare_outputs,
    is_divergence,
    is_similarity,
    is_statistic,
    per_sample,
    spread_of,
    statistic_of,
)
from vernier.accuracy.tasks import (
    Task,
    bigger_is_better,
    find_task,
    holds_probabilities,
    is_task_metric,
    task_metric,
    task_names,
)
from vernier.accuracy.text import cer, ctc_tokens, edit_distance, error_rate, wer

__all__ = [
    "DISTANCES",
    "SIMILARITIES",
    "Comparison",
    "Task",
    "bigger_is_better",
    "cer",
    "compare_outputs",
    "ctc_tokens",
    "decisions",
    "edit_distance",
    "error_rate",
    "find_task",
    "flip_rate",
    "holds_probabilities",
    "is_divergence",
    "is_similarity",
    "is_statistic",
    "is_task_metric",
    "per_sample",
    "spread_of",
    "statistic_of",
    "task_metric",
    "task_names",
    "wer",
]
