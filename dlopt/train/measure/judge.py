"""After an epoch: is it the best one so far, and has it been too long since one was?"""

from __future__ import annotations

import math

from dlopt.part import DloptError
from dlopt.train.checkpoint.state import TrainingState
from dlopt.train.job import Train
from dlopt.train.measure.metric import METRICS
from dlopt.train.measure.metrics import Metrics


def judge(state: TrainingState, train: Train, metrics: Metrics | None) -> None:
    """Keep the weights if this epoch is the best one, and end training when it has been too long ago. found: metrics of the
    validation split, where there is one. The weights are those that were measured.

    An epoch whose validation loss is not finite is never the best one; until another one is, the newest weights are kept.
    """
    record, stopping = state.record, train.early_stopping
    if metrics is None:
        record.best_epoch = record.epoch
        state.keep_best()
        return
    value = monitored(train, metrics)
    record.history.append(value)
    if record.best_value is None or value < record.best_value:
        record.best_value, record.best_epoch = value if math.isfinite(value) else None, record.epoch
        state.keep_best()
    margin = stopping.min_delta if stopping else 0.0
    if record.bar is None or value < record.bar - margin:
        record.bar, record.bar_epoch = value, record.epoch
    if stopping and record.epoch - record.bar_epoch >= stopping.patience:
        record.stopped = True


def monitored(train: Train, metrics: Metrics) -> float:
    """The value that decides, the smaller the better; infinite when the loss is not finite, whatever is monitored: the accuracy of
    outputs that are no numbers is a number.

    Raises DloptError when the split cannot tell it, which is no fault of the model.
    """
    if metrics["loss"] is None:
        return math.inf
    value = metrics[train.monitor]
    if value is None:
        raise DloptError(
            f"train.monitor: the validation split cannot tell {train.monitor} (it has too few rows or no row of a class): "
            "use monitor: loss or give data.split.validation a larger share"
        )
    return value if METRICS[train.monitor].smaller_is_better else -value
