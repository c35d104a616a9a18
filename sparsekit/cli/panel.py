"""The panel of ``sparsekit monitor``: GPUs, a table of runs, and the curve and the log of the chosen one."""

from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Log, Sparkline, Static

from .monitor import COLUMNS, cells, gpu_lines
from .terminal import printable
from .watch import Watch, WatchedRun, averaged

COLORS = {"running": "green", "finished": "cyan", "stopped": "yellow", "failed": "red", "killed": "red"}
SECONDS = 1.0  # between two looks
POINTS = 200  # of the large curve


class Question(ModalScreen[bool]):
    """A question that is answered by y or n.

    Args:
        text: the question.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", "Yes"),
        Binding("n,escape", "dismiss(False)", "No"),
    ]
    CSS = "Question { align: center middle; } Question Static { width: auto; padding: 1 2; border: round $warning; }"

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        yield Static(self._text, markup=False)


class Panel(App[None]):
    """A panel that shows the runs below a folder, anew every second.

    Args:
        folder: the folder.
    """

    TITLE = "sparsekit monitor"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "stop", "Stop the run"),
        Binding("q", "quit", "Leave"),
    ]
    CSS = """
    #gpus { height: auto; max-height: 9; padding: 0 1; color: $text-muted; }
    #runs { height: 1fr; min-height: 6; }
    #about { height: 1; padding: 0 1; text-style: bold; }
    #curve { height: 5; margin: 0 1; }
    #log { height: 1fr; padding: 0 1; }
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder, self._watch = folder, Watch(folder)
        self._runs: dict[str, WatchedRun] = {}
        self._said: tuple[str, str] | None = None

    def compose(self) -> ComposeResult:
        yield Static(id="gpus", markup=False)
        yield DataTable(id="runs", cursor_type="row")
        yield Static(id="about", markup=False)
        yield Sparkline(id="curve")
        yield Log(id="log")
        yield Footer()

    def on_mount(self) -> None:
        for name in COLUMNS:
            self.query_one("#runs", DataTable).add_column(name, key=name)
        self.look()
        self.set_interval(SECONDS, self.look)

    def look(self) -> None:
        """Reads all runs and shows them."""
        self.query_one("#gpus", Static).update("\n".join(gpu_lines()))
        table = self.query_one("#runs", DataTable)
        self._runs = {run.name: run for run in self._watch.read()}
        for key in [key.value for key in table.rows if key.value not in self._runs]:
            table.remove_row(str(key))
        for name, run in self._runs.items():
            shown = {key: Text(printable(text)) for key, text in cells(run).items()}
            shown["state"].stylize(COLORS.get(run.state, "magenta"))
            if name in table.rows:
                for key, text in shown.items():
                    table.update_cell(name, key, text, update_width=True)
            else:
                table.add_row(*shown.values(), key=name)
        self.show_chosen()

    def chosen(self) -> WatchedRun | None:
        """Returns the run that the cursor is on; None if there is none."""
        table = self.query_one("#runs", DataTable)
        return (
            self._runs.get(str(table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value))
            if table.rows
            else None
        )

    def show_chosen(self) -> None:
        """Shows the curve and the log of the chosen run."""
        run = self.chosen()
        about = f"no run below {self._folder}" if run is None else f"{run.name}: {run.loss or 'no records yet'}"
        self.query_one("#about", Static).update(printable(about))
        self.query_one("#curve", Sparkline).data = averaged(run.curve.points, POINTS) if run else []
        said = (run.name, run.log()) if run else ("", "")
        if said != self._said:
            self._said = said
            lines = [printable(line) for line in said[1].splitlines()]
            self.query_one("#log", Log).clear().write_lines(lines)

    def on_data_table_row_highlighted(self) -> None:
        self.show_chosen()

    def action_stop(self) -> None:
        """Stops the chosen run after a question."""
        run = self.chosen()
        if run is None or run.status is None or run.state != "running":
            self.notify("this run does not run", severity="warning")
            return
        status = run.status

        def answered(yes: bool | None) -> None:
            if yes:
                try:
                    status.stop()
                except (RuntimeError, OSError) as error:
                    self.notify(str(error), severity="error", markup=False)
                else:
                    self.notify(f"asked {run.name} to stop", markup=False)

        self.push_screen(Question(f"Stop {run.name}, process {status.process}? y or n"), answered)
