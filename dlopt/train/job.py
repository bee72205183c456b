"""The sections that training reads: `train` decides the result, `resources` only what it runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, ValidatorFunctionWrapHandler, field_validator, model_validator

from dlopt.data.augment import Augmentation
from dlopt.data.feed.order import LANES
from dlopt.models import Model
from dlopt.optim.averages import Averaging
from dlopt.optim.constraints import Clip, MaxNorm
from dlopt.optim.groups import Parameters
from dlopt.optim.optimizers import Adam, Lbfgs, Optimizer
from dlopt.optim.optimizers_library import ScheduleFreeAdamW, ScheduleFreeSgd
from dlopt.optim.schedules import Constant, Course, ScaleLr, Schedule
from dlopt.optim.wrappers import Lookahead
from dlopt.part import DloptError, Part, Target
from dlopt.train.checkpoint.stores import Checkpointing
from dlopt.train.loop.gradients import Sharpness
from dlopt.train.loop.losses import LossPart, losses_for
from dlopt.train.loop.precision import HALF, Precision
from dlopt.train.measure.metric import METRICS, listed, names
from dlopt.train.measure.thresholds import Threshold, Tuned
from dlopt.train.parallel.compression import Compression, PowerSGD
from dlopt.train.parallel.local_sgd import LocalSGD
from dlopt.train.parallel.strategies import Parallelism, refuse_communication
from dlopt.train.progress.track import Track
from dlopt.train.watch.divergence import Divergence
from dlopt.train.watch.layers import Health

if TYPE_CHECKING:
    Monitor = str
else:
    Monitor = Literal[tuple(METRICS)]
Label = Annotated[str, BeforeValidator(str)]
"""A label as a key, which JSON writes as a text be it a number or not."""


class EarlyStopping(Part):
    """Stop when the monitored value of the validation split no longer improves."""

    patience: int = Field(3, ge=1)
    """Epochs without improvement before the end."""
    min_delta: float = Field(0.0, ge=0)
    """A smaller change is no improvement."""


class Train(Part):
    """How the model is fitted."""

    epochs: int = Field(10, ge=1)
    """Passes over the training split."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["full"] = 128
    """Rows of a step, of the whole job: shared out over the workers. full: all rows of the training split, a step an epoch."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows whose gradients are computed at a time by each worker, where its memory is short of its share of a batch: they are added up to
    the same gradient. Batch normalization sees so many at a time: with it they are of all workers together."""
    optimizer: Optimizer = Adam()
    """What turns gradients into steps. With lr: auto a range test finds the peak rate before training."""
    parameters: Parameters = Parameters()
    """Which parameters have rates and decays of their own, and which are frozen."""
    schedule: Schedule = Constant()
    """What becomes of the learning rate."""
    scale_lr: ScaleLr | None = None
    """Take the optimizer's lr for that of another batch size, and scale it to this one."""
    lookahead: Lookahead | None = None
    """Slow weights that follow those of the optimizer."""
    sharpness: Sharpness | None = None
    """Sharpness-aware minimisation: gradients from the worst place near by."""
    centralize_gradients: bool = False
    """Take its mean out of the gradient of each unit (Yong et al. 2020)."""
    loss: LossPart | None = None
    """What a row costs. Without it, cross_entropy of classes, binary (cross-entropy) of labels, and squared (error) of numbers. The metric
    called loss is this one, without class weights and label smoothing."""
    l1: float = Field(0.0, ge=0)
    """Weight of the sum of absolute weights in the objective (biases and the scales of normalisation layers excepted). With `l2` beside it,
    the penalty is the elastic net: l1 * sum |w| + l2 * sum w^2, whose gradient is l1 * sign(w) + 2 * l2 * w."""
    l2: float = Field(0.0, ge=0)
    """Weight of the sum of squared weights in the objective (biases and the scales of normalisation layers excepted). The optimizer scales
    its gradient as it does that of the loss; `weight_decay` of optimizers such as adamw is not scaled."""
    max_norm: MaxNorm | None = None
    """A largest norm of the weights into each unit, held after every step."""
    clip: Clip | None = None
    """What becomes of gradients that are too large."""
    average: Averaging | None = None
    """An average of the weights over training, which is measured and kept in their place."""
    early_stopping: EarlyStopping | None = None
    """When to end before the last epoch."""
    monitor: Monitor = Field(
        "loss",
        description=f"What of the validation split decides on the best epoch, whose weights are kept, and on early stopping: {listed()}.",
    )
    threshold: Threshold | None = None
    """Of two classes and of labels: from which probability on a row is given the positive class, or a label. A number between 0 and 1, or
    {kind: tuned}, which finds the best one on the validation split when training has ended (of labels, one for each). The model's signature
    has it, so that metrics, predictions, the report and the server all follow it. Without it the likelier class is given, and labels above
    one half."""
    class_weights: Literal["balanced"] | dict[Label, Annotated[float, Field(gt=0)]] | None = None
    """What a row counts for in the loss, by its label: `balanced` makes the rows of all classes weigh the same together, and for
    labels those with and those without each; a mapping gives each label its weight, 1 where it is left out."""
    sampling: Literal["shuffle", "balanced"] = "shuffle"
    """Which rows an epoch has: each of them once, or as many, drawn so that all classes come equally often."""
    folds: int = Field(0, ge=0)
    """Cross-validation beside the job's own split: so many models more, each validated on another part of what is not for testing, and
    the mean and spread of their metrics in the report; 0 without."""
    precision: Precision = "float32"
    """Numbers that training computes with. With bfloat16 and float16 layers compute in half of the bits, on what has room for it faster and
    in less memory, while weights, averages, and all that is measured and served stay float32. float16 needs scaled losses, and leaves out a
    step when a gradient is too large for the scale, which is halved then."""
    compression: Compression | None = None
    """What of gradients workers send to each other, if not all: for slow networks."""
    synchronization: LocalSGD | None = None
    """Workers that train a replica each and exchange weights now and then, in place of gradients after every step: for networks that are
    slower still. The number of replicas decides the result."""
    health: Health = Health()
    """How closely the layers are watched, and what is warned of."""
    divergence: Divergence = Divergence()
    """When training goes back to the last checkpoint and on at a lower rate, or gives up."""
    log_every: int = Field(10, ge=1)
    """Steps between two lines in metrics.jsonl."""

    def rows_of_batch(self, rows: int) -> int:
        """The batch size for a training split of so many rows."""
        return rows if self.batch_size == "full" else self.batch_size

    @field_validator("class_weights", mode="wrap")
    @classmethod
    def weights_are_balanced_or_by_label(cls, given: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """One message for whatever is wrong with them."""
        try:
            return check(given)
        except ValidationError:
            raise ValueError(f"must be balanced, or a number greater than 0 for each label, not {given!r}") from None

    @model_validator(mode="after")
    def warmup_ends_in_time(self) -> Self:
        warmup = self.schedule.warmup.epochs
        if warmup is not None and warmup > self.epochs:
            raise ValueError(f"schedule.warmup: {warmup:g} epochs are more than epochs {self.epochs}: lower it or raise epochs")
        return self

    @model_validator(mode="after")
    def rate_is_scaled_or_found(self) -> Self:
        if self.scale_lr and self.optimizer.lr == "auto":
            raise ValueError("scale_lr: the rate that optimizer.lr: auto finds is that of this batch size: keep one of them")
        return self

    @model_validator(mode="after")
    def lbfgs_sees_the_gradient_of_its_loss(self) -> Self:
        if isinstance(self.optimizer, Lbfgs) and (self.clip or self.centralize_gradients or self.sharpness):
            raise ValueError("optimizer: lbfgs searches along the true gradient: take out clip, centralize_gradients and sharpness")
        return self

    @model_validator(mode="after")
    def what_is_not_sent_can_be_made_up_for(self) -> Self:
        if self.compression and self.synchronization:
            raise ValueError("compression: with synchronization no gradients are sent: keep one of them")
        if self.compression and isinstance(self.optimizer, Lbfgs):
            raise ValueError("optimizer: lbfgs searches along the true gradient: take out compression")
        if isinstance(self.compression, PowerSGD) and self.sharpness:
            raise ValueError("compression: power_sgd makes up for a step in the next, and sharpness has two gradients a step: use bfloat16")
        if isinstance(self.compression, PowerSGD) and self.precision == "float16":
            raise ValueError("compression: power_sgd keeps gradients over steps, whose scale float16 changes: use precision: bfloat16")
        return self

    @model_validator(mode="after")
    def replicas_can_be_put_together(self) -> Self:
        if self.synchronization and isinstance(self.optimizer, Lbfgs | ScheduleFreeSgd | ScheduleFreeAdamW):
            raise ValueError(f"synchronization: {self.optimizer.kind} must know all steps of the weights: use another optimizer")
        if self.synchronization and self.lookahead:
            raise ValueError("synchronization: lookahead goes back to weights of one replica: take one of them out")
        return self

    @model_validator(mode="after")
    def lbfgs_sees_small_differences(self) -> Self:
        if isinstance(self.optimizer, Lbfgs) and self.precision in HALF:
            raise ValueError(f"precision: lbfgs searches by small differences of the loss, which {self.precision} rounds off: use float32")
        return self

    @model_validator(mode="after")
    def one_fold_is_none(self) -> Self:
        if self.folds == 1:
            raise ValueError("folds must be 2 or more, or 0 for none")
        return self

    @model_validator(mode="after")
    def classes_are_balanced_once(self) -> Self:
        if self.class_weights == "balanced" and self.sampling == "balanced":
            raise ValueError("class_weights and sampling are both balanced, which would turn the imbalance around: keep one of them")
        return self


class Fit(Part):
    """All that decides the trained model, apart from the data."""

    seed: int
    """The job's seed."""
    model: Model
    """What is trained."""
    augment: tuple[Augmentation, ...]
    """What is done to rows, in this order."""
    train: Train
    """How."""


def course_of(fit: Fit, rows: int) -> Course:
    """How long training on so many rows is, in the units of schedules."""
    return Course.of(fit.train.epochs, rows, fit.train.rows_of_batch(rows))


class Resources(Part):
    """What a job runs on. None of it changes the result, so none of it is in a digest."""

    workers: Literal["auto"] | int | tuple[int, int] = "auto"
    """0 trains in the process of the run; N on N workers; [min, max] on as many as there are, more or fewer as they come and
    go; auto is every GPU of the cluster that a batch can be shared out to, or 0 without one. Where there are GPUs, each worker has one."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that each worker reserves (and threads that it computes with)."""
    feed: Literal["auto", "resident", "stream"] = "auto"
    """Keep the training split in memory, stream it through Ray Data, or choose by its size."""
    resident_bytes: int = Field(2 * 2**30, ge=0)
    """The largest training split, in bytes of decoded rows, that `feed: auto` keeps in memory: all of it with each worker, since in each
    epoch any row can be any worker's."""
    parallelism: Parallelism = "ddp"
    """What of a network each of several workers holds: ddp all of it; zero shares out the optimizer's state; fsdp shares out weights,
    gradients and state, for networks that are too large for the memory of one, at more communication: no worker ever has it whole, but
    worker 0 in the memory of its host when it draws the first weights and writes the last ones. A single worker holds it all."""
    max_failures: int = Field(3, ge=0)
    """How often workers that were lost, or Ray Train's controller, are replaced before the run fails. Workers that were told to end are
    replaced without limit."""
    hang_seconds: float = Field(300.0, gt=0)
    """A worker that makes no step for so long is taken for lost; with workers: 0 that is only said."""
    wait_seconds: float = Field(600.0, ge=0)
    """How long a run waits for CPUs and GPUs that others have taken before it fails."""
    resize_seconds: float = Field(30.0, ge=0)
    """How long elastic workers train, at least, before more of them take over."""
    checkpoint_activations: bool = False
    """Keep of each block of the network what goes into it alone, and compute the rest again on the way back: less memory for about a third
    more time, and the same bits."""
    compile: bool = False
    """Train the network compiled by torch.compile, with a warning where that cannot be done. It takes a minute or more to begin with, and
    changes the last digits of what is computed."""
    deterministic: bool = True
    """Use on GPUs what gives the same bits each time, as CPUs do anyhow; without it some steps are faster, and repeats and restarts differ
    in the last digits."""
    tf32: bool = False
    """Let GPUs multiply float32 matrices and filters in TF32, with 10 bits of 23: several times as fast, at a relative error of 1e-3."""
    profile: bool = False
    """Measure what the time of a step goes into: a breakdown, and a trace of some steps of each worker, in the model's folder `profile`."""
    track: tuple[Track, ...] = ()
    """Where the numbers of training go while it runs, beside the folder of the model: any of prometheus, tensorboard and mlflow."""
    checkpoint: Checkpointing = Checkpointing()
    """When training writes down where it stands, and where."""

    @model_validator(mode="after")
    def what_is_compiled_is_called_whole(self) -> Self:
        if self.compile and (self.checkpoint_activations or self.parallelism == "fsdp"):
            other = "checkpoint_activations" if self.checkpoint_activations else "parallelism: fsdp"
            raise ValueError(f"compile: {other} works block by block, which cannot be compiled: take one of them out")
        return self

    @model_validator(mode="after")
    def workers_fit_into_lanes(self) -> Self:
        if self.workers == "auto":
            return self
        low, high = self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)
        if low < 0 or high > LANES or (isinstance(self.workers, tuple) and not 1 <= low <= high):
            raise ValueError(f"workers must be 0 to {LANES}, or [min, max] with 1 <= min <= max <= {LANES}, or auto")
        return self


def needs_validation(train: Train) -> str | None:
    """What in the section looks at a validation split, if anything does."""
    if train.early_stopping:
        return "train.early_stopping"
    if isinstance(train.threshold, Tuned):
        return "train.threshold"
    return "train.schedule" if train.schedule.watches_validation() else None


def refuse_other_workers(train: Train, resources: Resources) -> None:
    """Raises DloptError when workers cannot tell each other what the job wants."""
    refuse_communication(train.compression, train.synchronization, resources.workers, resources.parallelism)


def refuse_monitor(train: Train, kind: str, classes: int | None = None) -> None:
    """Raises DloptError when a target has not the metric that decides. classes: how many there are, where that is known."""
    there = names(kind, classes)
    if train.monitor not in there:
        what = f"{kind}, which has {classes} classes" if kind == "category" and classes else kind
        raise DloptError(f"train.monitor: there is no {train.monitor} for a target of kind {what}: use one of {', '.join(there)}")


def refuse_loss(train: Train, kind: str) -> None:
    """Raises DloptError when the loss is not for a kind of target."""
    if train.loss is None or kind in train.loss.targets:
        return
    there = losses_for(kind)
    use = f"one of {', '.join(there)}" if len(there) > 1 else there[0]
    of = " or ".join(train.loss.targets)
    raise DloptError(f"train.loss: {train.loss.kind} is for a target of kind {of}, and it is of kind {kind}: use {use}, or take it out")


def refuse_threshold(train: Train, kind: str, classes: int | None = None) -> None:
    """Raises DloptError when a target has nothing that a threshold could decide. classes: how many there are, where that is known."""
    if train.threshold is None or kind == "multi_label" or (kind == "category" and classes in (None, 2)):
        return
    what = f"of {classes} classes" if kind == "category" else f"of kind {kind}"
    raise DloptError(f"train.threshold: it is for two classes and for labels, and the target is {what}: take it out")


def refuse_balance(train: Train, kind: str) -> None:
    """Raises DloptError when classes are to be balanced that a target has not."""
    if train.class_weights is not None and kind == "number":
        raise DloptError("train.class_weights: a target of kind number has no classes: take it out")
    if train.sampling == "balanced" and kind != "category":
        raise DloptError(f"train.sampling: balanced is for a target of kind category, and it is of kind {kind}: use shuffle")


def refuse_labels(train: Train, target: Target) -> None:
    """Raises DloptError when a weight is given to a label that is none."""
    known = [str(label) for label in target.labels]
    for label in train.class_weights if isinstance(train.class_weights, dict) else ():
        if label not in known:
            few = ", ".join(known[:10]) + (", ..." if len(known) > 10 else "")
            raise DloptError(f"train.class_weights: {label!r} is no label of {target.name!r}: there are {few}")
