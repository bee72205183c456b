"""Schedules: the factor on the peak learning rate as a function of the steps done. To add one: a class with `after`, and its name in
the union at the end. Plateau is the only one with memory, which is handed to it: the monitored values of the epochs so far.

Durations are in steps, epochs, rows, or shares of what they are part of: of the run; within a chain, of the chain (its parts' lengths)
or of the part (all that is in it). A warm-up comes first, and the schedule itself then runs over the rest, as if that were all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import AfterValidator, Field, GetJsonSchemaHandler, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from dlopt.part import DloptError, Part

NEARLY = 1e-6
"""Steps by which something may begin early, so that a tenth of 30 steps ends before the fourth."""

MEND = ": make it shorter or raise train.epochs"


class Course(NamedTuple):
    """What a schedule runs over: a run, or a part of one."""

    steps: float
    """How many steps it has, with fractions where a part ends within one."""
    epoch: float
    """Steps of an epoch."""
    batch: float
    """Rows of a step, on average."""
    begin: float = 0.0
    """Steps of the run before it."""

    @classmethod
    def of(cls, epochs: int, rows: int, batch_size: int) -> Course:
        """The whole of a run over `rows` training rows; the last batch of an epoch may be smaller."""
        epoch = -(-rows // batch_size)
        return cls(epochs * epoch, epoch, rows / epoch)

    def part(self, start: float, steps: float) -> Course:
        """The part that begins after `start` of its steps, and has `steps` of them or none."""
        return self._replace(steps=max(steps, 0.0), begin=self.begin + start)


class Span(Part):
    """A duration, in one of four units; a bare number means epochs."""

    steps: float | None = Field(None, ge=0)
    """In steps of the optimizer."""
    epochs: float | None = Field(None, ge=0)
    """In epochs, of which parts are allowed."""
    rows: float | None = Field(None, ge=0)
    """In training rows."""
    share: float | None = Field(None, ge=0, le=1)
    """As a share, from 0 to 1, of the run or of that part of it that the duration is in."""

    @model_validator(mode="before")
    @classmethod
    def a_bare_number_is_epochs(cls, given: Any) -> Any:
        if isinstance(given, (int, float, str)):
            return {"epochs": given}
        if not isinstance(given, (dict, Span)):
            raise ValueError("must be a number of epochs, or one of {steps: 100}, {epochs: 0.5}, {rows: 10000} and {share: 0.05}")
        return given

    @model_validator(mode="after")
    def exactly_one_unit_is_given(self) -> Self:
        if len(self._given()) != 1:
            raise ValueError("must have exactly one of steps, epochs, rows and share")
        return self

    @model_serializer
    def _given(self) -> dict[str, float]:
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """A number, or the mapping: what JSON Schema says of the one does not bear upon the other."""
        return handler(core) | {"type": ["number", "object"], "minimum": 0}

    def __str__(self) -> str:
        ((unit, value),) = self._given().items()
        return f"{100 * value:g} %" if unit == "share" else f"{value:,.10g} {unit}"

    def steps_of(self, course: Course) -> float:
        """How many steps it is, with fractions, in a course."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return self.epochs * course.epoch
        return self.rows / course.batch if self.rows is not None else (self.share or 0.0) * course.steps


def _positive(span: Span) -> Span:
    if not any(span.model_dump().values()):
        raise ValueError("must be more than 0")
    return span


Positive = Annotated[Span, AfterValidator(_positive)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Scheduled(Part):
    """What all schedules share: a length, and a linear rise at the start."""

    warmup: Span = Span(epochs=0)
    """How long the rate rises at the start, in a line, to where the schedule begins; the schedule then runs over the rest."""
    warmup_from: Fraction = 0.0
    """Where the rise begins, as a share of where it ends."""
    length: Positive | None = None
    """How long the schedule runs, warm-up included; after it the last rate stays, or in a chain the next part begins. All there is, if
    it is left out."""

    must_fit: ClassVar[tuple[str, ...]] = ()
    """The fields with durations that make no sense when they are longer than what they are in."""

    def factor(self, step: float, course: Course, history: Sequence[float] = ()) -> float:
        """The factor on the peak rate for the batch that begins after `step` steps. history: the monitored value of every epoch that
        is finished, the smaller the better; NaN is no improvement."""
        inner = self.course(course)
        return self.within(min(step, inner.steps), inner, history)

    def course(self, course: Course) -> Course:
        """What of a course its length leaves it."""
        return course.part(0.0, self.length.steps_of(course)) if self.length else course

    def within(self, step: float, course: Course, history: Sequence[float] = ()) -> float:
        """The factor when the course is all the schedule's own: the warm-up, then the rest."""
        warmup = self.warmup.steps_of(course)
        rest = course.part(warmup, course.steps - warmup)
        if step >= warmup:
            return self.after(step - warmup, rest, history)
        return (self.warmup_from + (1 - self.warmup_from) * step / warmup) * self.after(0.0, rest, history)

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        """The factor `step` steps after the warm-up. course: what is left after it."""
        raise NotImplementedError

    def watches_validation(self) -> bool:
        """Whether it looks at the history."""
        return False

    def too_long(self, course: Course) -> Iterator[str]:
        """What does not fit, each as the field below this one and what is wrong with it. course: all the schedule's own."""
        if (warmup := self.warmup.steps_of(course)) > course.steps + NEARLY:
            yield f"warmup: {_longer(self.warmup, warmup, course)}"
        rest = course.part(warmup, course.steps - warmup)
        for name in self.must_fit:
            spans = getattr(self, name)
            for place, span in enumerate(spans) if isinstance(spans, tuple) else [(None, spans)] if spans else []:
                if (steps := span.steps_of(rest)) > rest.steps + NEARLY:
                    yield f"{name if place is None else f'{name}.{place}'}: {_longer(span, steps, rest)}"


class Constant(Scheduled):
    """The same rate all along."""

    kind: Literal["constant"] = "constant"
    level: float = Field(1.0, ge=0)
    """The rate, as a share of the peak rate."""

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return self.level


class StepDecay(Scheduled):
    """Fall by a factor at equal distances, as torch's StepLR."""

    kind: Literal["step"] = "step"
    step_size: Positive = Span(share=0.3)
    """How long the rate stays between two falls."""
    decay: float = Field(0.1, gt=0, le=1)
    """Factor at each fall."""
    must_fit = ("step_size",)

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return self.decay ** _whole(step, self.step_size.steps_of(course))


class MultiStep(Scheduled):
    """Fall by a factor at each milestone, as torch's MultiStepLR."""

    kind: Literal["multi_step"] = "multi_step"
    milestones: tuple[Span, ...] = (Span(share=0.5), Span(share=0.75))
    """When the rate falls, counted from the end of the warm-up."""
    decay: float = Field(0.1, gt=0, le=1)
    """Factor at each fall."""
    must_fit = ("milestones",)

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return self.decay ** sum(step >= milestone.steps_of(course) - NEARLY for milestone in self.milestones)


class Exponential(Scheduled):
    """decay to the power of the epochs done, or of other equal times."""

    kind: Literal["exponential"] = "exponential"
    decay: float = Field(0.9, gt=0, le=1)
    """Factor over the time that `every` says."""
    every: Positive = Span(epochs=1)
    """Over how long the rate falls by the factor `decay`."""
    staircase: bool = False
    """Fall at the ends of these times instead of smoothly, as torch's ExponentialLR."""

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return self.decay ** _times(step, self.every.steps_of(course), self.staircase)


class InverseTime(Scheduled):
    """1 / (1 + decay * t), t in epochs or other equal times (Robbins, Monro 1951)."""

    kind: Literal["inverse_time"] = "inverse_time"
    decay: float = Field(1.0, ge=0)
    """How much is added to what the rate is divided by, over the time that `every` says."""
    every: Positive = Span(epochs=1)
    """The unit of time."""
    staircase: bool = False
    """Fall at the ends of these times instead of smoothly."""

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return 1 / (1 + self.decay * _times(step, self.every.steps_of(course), self.staircase))


class InverseSqrt(Scheduled):
    """sqrt(t / (t + s)), s steps after the warm-up: with t the length of the warm-up, one over the root of the steps done (Vaswani et
    al. 2017)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    timescale: Positive | None = None
    """t: after how long the rate is 1 / sqrt(2) of its peak. The length of the warm-up, if left out; without one an epoch."""

    def within(self, step: float, course: Course, history: Sequence[float] = ()) -> float:
        warmup = self.warmup.steps_of(course)
        scale = self.timescale.steps_of(course) if self.timescale else warmup or course.epoch
        return super().within(min(step, warmup), course) * math.sqrt(scale / (scale + max(step - warmup, 0.0)))

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return 1.0


class Polynomial(Scheduled):
    """From one level to another as a power of what is left, as torch's PolynomialLR."""

    kind: Literal["polynomial"] = "polynomial"
    power: float = Field(1.0, gt=0)
    """1 is a line; 2 falls fast and ends slowly."""
    start_factor: float = Field(1.0, ge=0)
    """Where it begins, as a share of the peak rate."""
    end_factor: float = Field(0.0, ge=0)
    """Where it ends, as a share of the peak rate."""

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return self.end_factor + (self.start_factor - self.end_factor) * (1 - _progress(step, course.steps)) ** self.power


class Linear(Scheduled):
    """From one level to another in a line, as torch's LinearLR."""

    kind: Literal["linear"] = "linear"
    start_factor: float = Field(1.0, ge=0)
    """Where it begins, as a share of the peak rate."""
    end_factor: float = Field(0.0, ge=0)
    """Where it ends, as a share of the peak rate."""

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return self.start_factor + (self.end_factor - self.start_factor) * _progress(step, course.steps)


class Cosine(Scheduled):
    """Half a cosine, from 1 down to `floor` (Loshchilov, Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"
    floor: Fraction = 0.0
    """Where it ends, as a share of the peak rate."""

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return self.floor + (1 - self.floor) * _cosine(_progress(step, course.steps))


class CosineRestarts(Scheduled):
    """Half a cosine again and again, each time longer (SGDR: Loshchilov, Hutter 2017), as torch's CosineAnnealingWarmRestarts."""

    kind: Literal["cosine_restarts"] = "cosine_restarts"
    period: Positive = Span(share=0.25)
    """How long the first of them is (T_0)."""
    multiplier: float = Field(1.0, ge=1)
    """How many times as long each is as the one before (T_mult)."""
    decay: float = Field(1.0, gt=0, le=1)
    """Factor on the height of each, by the one before."""
    floor: Fraction = 0.0
    """Where each ends, as a share of the peak rate."""
    must_fit = ("period",)

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        restarts, progress = self._place(step, self.period.steps_of(course))
        return self.floor + (1 - self.floor) * self.decay**restarts * _cosine(progress)

    def _place(self, step: float, period: float) -> tuple[int, float]:
        """How many have ended, and how far the present one is."""
        if self.multiplier == 1:
            restarts = _whole(step, period)
            return restarts, max(step / period - restarts, 0.0)
        restarts = 0
        while step >= period - NEARLY:
            step, period, restarts = step - period, period * self.multiplier, restarts + 1
        return restarts, max(step / period, 0.0)


class OneCycle(Scheduled):
    """Up from a low rate to the peak and down far below where it began (Smith, Topin 2018), as torch's OneCycleLR; the momentum stays."""

    kind: Literal["one_cycle"] = "one_cycle"
    pct_start: float = Field(0.3, gt=0, lt=1)
    """The share of the steps in which the rate rises."""
    div_factor: float = Field(25.0, ge=1)
    """The peak rate over the first one."""
    final_div_factor: float = Field(1e4, ge=1)
    """The first rate over the last one."""
    anneal: Literal["cos", "linear"] = "cos"
    """The form of rise and fall: half a cosine or a line."""
    three_phase: bool = False
    """Fall to the first rate in as many steps as the rise had, then to the last rate over the rest."""

    @model_validator(mode="after")
    def three_phases_have_room(self) -> Self:
        if self.three_phase and self.pct_start >= 0.5:
            raise ValueError(f"three_phase needs pct_start below 0.5, for the fall takes as long as the rise, and it is {self.pct_start:g}")
        return self

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        begin, (*phases, last) = 0.0, self._phases(course.steps)
        for end, low, high in phases:
            if step <= end:
                return self._between(low, high, _progress(step - begin, end - begin))
            begin = end
        return self._between(last[1], last[2], _progress(step - begin, last[0] - begin))

    def _phases(self, steps: float) -> list[tuple[float, float, float]]:
        """The last step of each phase, and the factors between which it goes: the very last batch has the last rate."""
        first, rise = 1 / self.div_factor, self.pct_start * steps - 1
        fall = [(2 * rise, 1.0, first)] if self.three_phase else []
        return [(rise, first, 1.0), *fall, (steps - 1, first if fall else 1.0, first / self.final_div_factor)]

    def _between(self, start: float, end: float, progress: float) -> float:
        return end + (start - end) * (_cosine(progress) if self.anneal == "cos" else 1 - progress)


class Cyclic(Scheduled):
    """Up and down in lines, again and again (Smith 2017), as torch's CyclicLR; the momentum stays."""

    kind: Literal["cyclic"] = "cyclic"
    base: Fraction = 0.1
    """The lowest rate, as a share of the peak rate."""
    step_size_up: Positive = Span(share=0.125)
    """How long a rise is."""
    step_size_down: Positive | None = None
    """How long a fall is; as long as a rise, if left out."""
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    """Whether cycles are all as high, each half as high as the one before, or lower by `gamma` from step to step."""
    gamma: float = Field(0.9999, gt=0, le=1)
    """Factor on the height from step to step, in mode exp_range."""
    must_fit = ("step_size_up", "step_size_down")

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        up = self.step_size_up.steps_of(course)
        down = self.step_size_down.steps_of(course) if self.step_size_down else up
        cycle = _whole(step, up + down)
        place = max(step - cycle * (up + down), 0.0)
        height = place / up if place <= up else (up + down - place) / down
        return self.base + (1 - self.base) * height * self._scale(cycle, step)

    def _scale(self, cycle: int, step: float) -> float:
        match self.mode:
            case "triangular":
                return 1.0
            case "triangular2":
                return 0.5**cycle
        return self.gamma**step


class WarmupStableDecay(Scheduled):
    """A rise, the peak rate for most of the run, and a fall at its end (Hu et al. 2024; Hägele et al. 2024)."""

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    warmup: Span = Span(share=0.05)
    """How long the rate rises at the start, in a line; the other two phases then take the rest."""
    cooldown: Positive = Span(share=0.2)
    """How long the rate falls at the end."""
    form: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"
    """The form of the fall: 1 - p, half a cosine, or 1 - sqrt(p) of its progress p."""
    floor: Fraction = 0.0
    """Where it ends, as a share of the peak rate."""
    must_fit = ("cooldown",)

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        cooldown = self.cooldown.steps_of(course)
        progress = _progress(max(step - (course.steps - cooldown), 0.0), cooldown)
        return self.floor + (1 - self.floor) * self._left(progress)

    def _left(self, progress: float) -> float:
        match self.form:
            case "linear":
                return 1 - progress
            case "cosine":
                return _cosine(progress)
        return 1 - math.sqrt(progress)


class Plateau(Scheduled):
    """Fall when the monitored value of the validation split stops improving, as torch's ReduceLROnPlateau."""

    kind: Literal["plateau"] = "plateau"
    decay: float = Field(0.1, gt=0, lt=1)
    """Factor at each fall."""
    patience: int = Field(2, ge=0)
    """Epochs without improvement before a fall."""
    cooldown: int = Field(0, ge=0)
    """Epochs after a fall before patience begins to be tried again."""
    min_delta: float = Field(1e-4, ge=0, lt=1)
    """The share of the best value by which a better one counts as improvement."""
    floor: Fraction = 0.0
    """The lowest rate, as a share of the peak rate."""

    def within(self, step: float, course: Course, history: Sequence[float] = ()) -> float:
        """In a chain only the epochs count that began in its part."""
        before = math.ceil((course.begin - NEARLY) / course.epoch)
        return super().within(step, course) * max(self.decay ** self.falls(history[max(before, 0) :]), self.floor)

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        return 1.0

    def watches_validation(self) -> bool:
        return True

    def falls(self, values: Sequence[float]) -> int:
        """How often the rate has fallen, given the monitored value of every epoch so far."""
        best, bad, rest, falls = math.inf, 0, 0, 0
        for value in values:
            if value < best * (1 - math.copysign(self.min_delta, best)):
                best, bad = value, 0
            else:
                bad += 1
            if rest:
                rest, bad = rest - 1, 0
            if bad > self.patience:
                falls, bad, rest = falls + 1, 0, self.cooldown
        return falls


class Chain(Scheduled):
    """Schedules one after the other, each with its own warm-up and from its own beginning, as torch's SequentialLR."""

    kind: Literal["chain"] = "chain"
    parts: tuple[Schedule, ...] = Field(min_length=1)
    """The schedules. All but the last say their `length`; the last takes the rest."""

    @model_validator(mode="after")
    def parts_have_lengths(self) -> Self:
        for place, part in enumerate(self.parts[:-1]):
            if part.length is None:
                raise ValueError(f"parts.{place} has no length: only the last part can take the rest, so give it one, {{share: 0.1}} say")
        return self

    def after(self, step: float, course: Course, history: Sequence[float]) -> float:
        courses = self._courses(course)
        now = max(place for place, part in enumerate(courses) if place == 0 or step >= part.begin - course.begin - NEARLY)
        mine = courses[now]
        done = min(max(step - (mine.begin - course.begin), 0.0), mine.steps)
        return self.parts[now].within(done, mine, history)

    def _courses(self, course: Course) -> list[Course]:
        """What each part runs over."""
        courses, start = [], 0.0
        for part in self.parts:
            steps = part.length.steps_of(course) if part.length else course.steps - start
            courses.append(course.part(start, steps))
            start += steps
        return courses

    def watches_validation(self) -> bool:
        return any(part.watches_validation() for part in self.parts)

    def too_long(self, course: Course) -> Iterator[str]:
        yield from super().too_long(course)
        warmup = self.warmup.steps_of(course)
        rest = course.part(warmup, course.steps - warmup)
        lengths = sum(part.length.steps_of(rest) for part in self.parts[:-1] if part.length)
        if self.parts[1:] and lengths > rest.steps - NEARLY:
            yield f"parts: the last one has no step left, for those before it take {lengths:,.10g} of {rest.steps:,.10g}"
        for place, (part, mine) in enumerate(zip(self.parts, self._courses(rest), strict=True)):
            yield from (f"parts.{place}.{said}" for said in part.too_long(mine))


Schedule = Annotated[
    Constant
    | StepDecay
    | MultiStep
    | Exponential
    | InverseTime
    | InverseSqrt
    | Linear
    | Polynomial
    | Cosine
    | CosineRestarts
    | OneCycle
    | Cyclic
    | WarmupStableDecay
    | Plateau
    | Chain,
    Field(discriminator="kind"),
]
Chain.model_rebuild()


class ScaleLr(Part):
    """The peak rate grows with the batch: it is said for a batch of `base` rows (Goyal et al. 2017; Krizhevsky 2014)."""

    rule: Literal["linear", "sqrt"] = "linear"
    """In proportion to the rows of a batch (for SGD), or to their root (for Adam and its like)."""
    base: int = Field(256, ge=1)
    """The rows of a batch for which the optimizer's lr is meant."""

    def factor(self, batch_size: int) -> float:
        """What the peak rate is multiplied by."""
        ratio = batch_size / self.base
        return ratio if self.rule == "linear" else math.sqrt(ratio)


def refuse_too_long(schedule: Scheduled, course: Course) -> None:
    """Raises DloptError when a duration of a schedule is longer than what it is in: the run, or its part of a chain."""
    if schedule.length and (steps := schedule.length.steps_of(course)) > course.steps + NEARLY:
        raise DloptError(f"train.schedule.length: {_longer(schedule.length, steps, course)}{MEND}")
    for said in schedule.too_long(schedule.course(course)):
        raise DloptError(f"train.schedule.{said}{MEND}")


def _longer(span: Span, steps: float, course: Course) -> str:
    took = "" if span.steps is not None else f" ({steps:,.10g} steps)"
    return f"{span}{took} is more than the {course.steps:,.10g} steps that there are"


def _whole(step: float, size: float) -> int:
    """How many times `size` has passed after `step` steps."""
    return math.floor((step + NEARLY) / size)


def _times(step: float, size: float, staircase: bool) -> float:
    return _whole(step, size) if staircase else step / size


def _progress(step: float, steps: float) -> float:
    """From 0 to 1 over `steps` steps, of which there may be none."""
    return min(max(step / steps, 0.0), 1.0) if steps > 0 else 1.0


def _cosine(progress: float) -> float:
    """From 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * progress))
