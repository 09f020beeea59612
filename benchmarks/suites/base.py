"""Tasks: what one comparison is about, in a form that travels to a worker process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine import Context
from ..results import Row

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Task:
    """One comparison: every provider on the same inputs, timed in turns.

    Args:
        suite, case, mode, routing, dtype: as in the rows.
        tokens: T of one call, where the suite has tokens.
        batch: images of one call, where the suite has images.
        device: "cuda" or "cpu".
        providers: names, in the order of building.
        timers: "eager", "graph" or both.
    """

    suite: str
    case: str
    mode: str
    routing: str
    dtype: str
    device: str
    providers: tuple[str, ...]
    timers: tuple[str, ...]
    tokens: int | None = None
    batch: int | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        """dtype as torch knows it."""
        return DTYPES[self.dtype]

    @property
    def token_count(self) -> int:
        """tokens, of a task that has them."""
        if self.tokens is None:
            raise ValueError(f"task: got no tokens in suite {self.suite}, expected a number")
        return self.tokens

    @property
    def image_count(self) -> int:
        """batch, of a task that has one."""
        if self.batch is None:
            raise ValueError(f"task: got no batch in suite {self.suite}, expected a number")
        return self.batch

    @property
    def template(self) -> Row:
        """A row with this task's columns filled in."""
        return Row(self.suite, self.case, self.tokens, self.batch, self.mode, "", self.dtype, self.routing, "")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """The inverse of `to_dict`."""
        return cls(**{**values, "providers": tuple(values["providers"]), "timers": tuple(values["timers"])})


@dataclass(frozen=True)
class Choice:
    """What the command line chose; None stands for the suite's default.

    Args:
        cases, tokens, batches, modes, routings, providers: lists as given.
        timers: "eager", "graph".
        dtype: "bf16", "fp16" or "fp32".
        device: "cuda" or "cpu".
        tiny: sizes that a CPU measures in seconds.
    """

    cases: Sequence[str] | None = None
    tokens: Sequence[int] | None = None
    batches: Sequence[int] | None = None
    modes: Sequence[str] | None = None
    routings: Sequence[str] | None = None
    providers: Sequence[str] | None = None
    timers: Sequence[str] = ("eager", "graph")
    dtype: str = "bf16"
    device: str = "cuda"
    tiny: bool = False


@dataclass(frozen=True)
class Suite:
    """A kind of measurement.

    Args:
        name: as in the rows and in the names of the result files.
        providers: every provider name it knows.
        plan: what to measure, given the command line's choice.
        run: measure one task.
    """

    name: str
    providers: tuple[str, ...]
    plan: Callable[[Choice], list[Task]]
    run: Callable[[Task, Context], list[Row]]


def choose(given: Sequence[Any] | None, default: Sequence[Any], tiny: Sequence[Any], choice: Choice) -> Sequence[Any]:
    """The given list, else the tiny one in tiny form, else the default."""
    if given is not None:
        return given
    return tiny if choice.tiny else default


def choose_providers(choice: Choice, known: Sequence[str], default: Sequence[str] | None = None) -> tuple[str, ...]:
    """The chosen providers that this suite knows, in the suite's order; if none was chosen, the default or all."""
    chosen = choice.providers if choice.providers is not None else default if default is not None else known
    return tuple(name for name in known if name in chosen)
