"""``sparsekit sweep``: named variants of a training command, each in a run of its own, and their results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .._json import parse_json, write_json
from ..runs.lock import lock_folder, unlock_folder
from . import terminal
from .errors import UsageError, check_installed, check_positive
from .processes import run_commands
from .results import collect, columns, shown, write_picture, write_tables
from .variants import Variant, read_variants

RECORD = "sweep.json"


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Run named variants of a training command, and collect their results in a table and a plot.

    The TOML file has command = "python train.py --out {out}", args for all variants, and [variants.NAME] with args of
    its own; {out} is the folder of the variant, which the command gives to Run.open. What is finished is not run again,
    what was interrupted goes on, and one that fails does not stop the others.

    Args:
        file: the TOML file.
        out: the folder with a folder and a .txt file of output for each variant, results.csv, .md and .png.
        jobs: how many run at once, each on a GPU of its own where there are as many.
        only: names of variants, all others are left out.
        json: print the results as JSON on stdout, and nothing else there.
        debug: show where an error comes from.
    """

    file: Annotated[Path, tyro.conf.Positional]
    out: Path
    jobs: int = 1
    only: tuple[str, ...] = ()
    json: bool = False
    debug: bool = False

    def run(self) -> int:
        check_installed("a sweep", matplotlib="matplotlib", pynvml="nvidia-ml-py")
        check_positive(jobs=self.jobs)
        variants = read_variants(self.file)
        names = [variant.name for variant in variants]
        if strange := [name for name in self.only if name not in names]:
            raise UsageError(f"--only {strange[0]} is no variant of {self.file}: {', '.join(names)}")
        chosen = [variant for variant in variants if not self.only or variant.name in self.only]
        if self.out.exists() and not self.out.is_dir():
            raise UsageError(f"{self.out} is a file, a folder is needed")
        self.out.mkdir(parents=True, exist_ok=True)
        lock_folder(self.out)
        try:
            self.note(chosen)
            try:
                run_commands(self.pending(chosen), self.out, jobs=self.jobs, say=terminal.say)
            finally:
                rows = collect(self.out, names)
                write_tables(self.out, rows)
            self.show(rows)
            write_picture(self.out, rows)
        finally:
            unlock_folder(self.out)
        finished = {row["variant"] for row in rows if row["state"] == "finished"}
        left = [variant.name for variant in chosen if variant.name not in finished]
        if left:
            terminal.fail(f"{', '.join(left)} did not finish: see {self.out / left[0]}.txt")
        return 1 if left else 0

    def note(self, chosen: list[Variant]) -> None:
        """Writes down the commands of the variants.

        Raises:
            UsageError: a variant was run with another command, so that its folder holds another run.
        """
        path = self.out / RECORD
        if path.exists():
            try:
                known: dict[str, Any] = dict(parse_json(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise UsageError(f"{path} is not the record of a sweep: {error}") from error
        elif strange := next((each.name for each in self.out.iterdir() if not each.name.startswith(".")), None):
            raise UsageError(f"{self.out} holds no sweep, but {strange}: name another folder")
        else:
            known = {}
        for variant in chosen:
            before, folder = known.get(variant.name), self.out / variant.name
            if before is not None and before != list(variant.command) and folder.exists():
                raise UsageError(
                    f"{variant.name} was run by another command, {' '.join(map(str, before))}: remove {folder}, "
                    "or name another variant"
                )
            known[variant.name] = list(variant.command)
        write_json(path, known)

    def pending(self, chosen: list[Variant]) -> dict[str, list[str]]:
        """Returns the commands that are still to be run."""
        commands = {}
        for variant, row in zip(chosen, collect(self.out, [each.name for each in chosen]), strict=True):
            if row["state"] in ("finished", "running"):
                terminal.say(f"{variant.name}: {'is' if row['state'] == 'finished' else 'is still'} {row['state']}")
            else:
                commands[variant.name] = variant.filled(self.out / variant.name)
        return commands

    def show(self, rows: list[dict[str, Any]]) -> None:
        """Prints the results."""
        if self.json:
            terminal.print_json(rows)
            return
        names = columns(rows)
        terminal.table(names, [[shown(row.get(name)) for name in names] for row in rows], left=("state",))
        terminal.write(f"written to {self.out / 'results.csv'}, .md and .png")
