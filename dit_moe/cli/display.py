"""Progress of training and the table of the experts' load."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..training import Trainer, TrainingReport


def train_with_progress(
    trainer: Trainer,
    console: Console,
    *,
    report_every: int,
    until: int | None = None,
    on_report: Callable[[TrainingReport], object] | None = None,
    should_stop: Callable[[], bool] | None = None,
    describe: Callable[[TrainingReport], str] | None = None,
) -> None:
    """Run the trainer below a progress bar; each report becomes a line, so that logs without a terminal show it too."""
    with training_progress(console) as progress:
        task = progress.add_task("training", total=trainer.settings.steps, completed=trainer.step)

        def show(report: TrainingReport) -> None:
            if on_report is not None:
                on_report(report)
            console.print((describe or report_line)(report), highlight=False, soft_wrap=True)

        trainer.run(
            until,
            report_every=report_every,
            on_report=show,
            should_stop=should_stop,
            on_step=lambda step: progress.update(task, completed=step),
        )


def training_progress(console: Console) -> Progress:
    """The bar: steps done, time gone and to come."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def report_line(report: TrainingReport) -> str:
    """One line of figures; load is that of the least and the most visited expert of any layer, 1 being even."""
    line = f"step {report.step:>6}  loss {report.loss:.4f}"
    if report.expert_load:
        low, high = min(map(min, report.expert_load)), max(map(max, report.expert_load))
        line += f"  balance {report.balance_loss:.4f}  load {low:.2f} to {high:.2f}"
    return (
        f"{line}  grad {report.grad_norm:.2f}  lr {report.learning_rate:.1e}  {report.images_per_second:,.0f} images/s"
    )


def print_expert_load(console: Console, expert_load: tuple[tuple[float, ...], ...]) -> None:
    """A table with one row a layer, one column an expert: its share of the choices, where 1.00 is an even share."""
    console.print("expert load by layer: share of the routed tokens, 1.00 is even", highlight=False)
    table = Table()
    table.add_column("layer", justify="right")
    for expert in range(len(expert_load[0]) if expert_load else 0):
        table.add_column(f"e{expert}", justify="right")
    for layer, loads in enumerate(expert_load):
        table.add_row(str(layer), *(Text(f"{load:.2f}", style=_style(load)) for load in loads))
    console.print(table)


def _style(load: float) -> str:
    if load < 0.1:
        return "bold red"  # hardly ever chosen
    return "yellow" if load > 2 else ""
