"""Fuzzing: changed files of every kind, read by what users run.

    python -m tests.fuzz --format routing --mutants 1000    # many, counted by verdict
    python -m tests.fuzz --format routing --seed 17         # one, again

The invariant: an error in one line, or the right answer, never another; no hang, no death, nothing
written outside. "Right" is what a slow, plain reader makes of the changed files (readers.py).

| module | what |
|---|---|
| world.py | the files before they are changed |
| traces.py | other engines' logs among them, and a plain reading of each |
| mutants.py | a seed's change to them |
| readers.py | what users run, and the plain reading of the same |
| worker.py | a process that judges mutants, with a limit of memory |
| __main__.py | many workers' verdicts, each in a limit of time |
| corpus/ | changed files of earlier findings, which the tests read again |
"""
