"""Where the numbers of training go while it runs, beside the artifact's own files: a file for each tracker, and its name in the union.

All of them read the same lines in the driver (see `tracker`), each on a thread of its own (see `courier`), so none of them can hold up
or harm training, and the workers know nothing of them.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dlopt.train.progress.track.mlflow import MLflow
from dlopt.train.progress.track.prometheus import Prometheus
from dlopt.train.progress.track.tensorboard import TensorBoard

Track = Annotated[Prometheus | TensorBoard | MLflow, Field(discriminator="kind")]
"""The list of what there is."""
