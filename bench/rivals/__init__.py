"""sparsekit against the other ways to run a model on a CPU: `make rivals`, which is `python -m bench.rivals`.

Every rival runs the same 2:4 model in a process of its own. All of them are ready before the first is timed; then they
take turns for several rounds, so that a slow phase of the machine meets all. `python -m bench.rivals --help` lists the
options; `python -m bench.report` writes the tables of README and docs/rivals.md from the stored results.
"""
