"""Which runs are there? The reader of runs for all studies. It checks what it reads.

A run is read from its folder (config.json, metrics.csv, per_context.csv), or from the three tables
that studies/compare.py keeps in results/:

    runs.csv            a row per run: its name, its experiment, its settings, its versions
    metrics.csv         a row per run and evaluation
    contexts.csv.gz     a row per run and context: the returns of the last evaluation

An error is one line that names the file and the line in it.
"""

import csv
import gzip
import io
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import aib_envs  # noqa: E402
import dmash  # noqa: E402
from dmash import SETS, BadInput  # noqa: E402

VERSIONS = ("version", "torch", "numpy", "mujoco", "gymnasium")
OURS = "DMA*-SH"
UNTOLD = ("env", "method", "seed", "out")  # of config.json, these are no settings of a run
TECHNICAL = ("threads", "device", "snapshots")  # runs that differ in these alone are compared
OF_METRICS = ("step", "seconds", *SETS)  # columns of numbers that must be there
TABLES = ("runs.csv", "metrics.csv", "contexts.csv.gz")


@dataclass
class Run:
    name: str  # of its folder; in the tables its experiment stands before it
    experiment: str
    env: str
    method: str
    seed: int
    settings: dict  # texts by name; a setting that is off is not there
    versions: dict  # texts by name
    metrics: list  # a dict of numbers per evaluation
    contexts: list  # a dict per context of the last evaluation, if the run is finished
    place: Path

    @property
    def steps(self):
        return int(self.settings["steps"])

    @property
    def finished(self):
        """At its last step, with the returns of all contexts kept."""
        return bool(self.contexts)

    @property
    def at_end(self):
        return bool(self.metrics) and self.metrics[-1]["step"] == self.steps

    @property
    def label(self):
        """The method's name in the paper, with the mask if it is not the method's own."""
        name = paper_name(self.method)
        mask = float(self.settings.get("mask", 0))
        if self.method in dmash.METHODS and mask != dmash.METHODS[self.method].mask:
            name += f", mask {mask:g}"
        return name

    @property
    def departures(self):
        """What studies/departures.py changed, or an empty text."""
        return self.settings.get("departures", "")

    @property
    def arm(self):
        return joined(self.label, self.departures)

    @property
    def compared(self):
        """The settings that runs must have in common to be compared, as sorted pairs.

        A replay that the run cannot fill forgets nothing. Its size makes no difference.
        """
        apart = ["mask", "departures", *TECHNICAL]  # mask and departures are told by `arm`
        rows = 2 * (self.steps + float(self.settings.get("random_steps", 0)))
        if float(self.settings.get("buffer", 0)) >= rows:
            apart.append("buffer")
        pairs = [(name, text) for name, text in self.settings.items() if name not in apart]
        return tuple(sorted(pairs))

    def last(self, score):
        return self.metrics[-1][score]


def joined(*texts):
    """The texts that are not empty, with commas between."""
    return ", ".join(filter(None, texts))


def in_words(values):
    """Names and numbers, such as those of a context."""
    return joined(*(f"{name} {value:g}" for name, value in values.items()))


def paper_name(method):
    known = dmash.METHODS.get(method)
    if known is None or known.paper == "ablation":
        return method
    return known.paper


def rank(run):
    """The order of runs in tables and figures: environments and methods as in their own tables."""
    env = place(run.env, aib_envs.ENVS)
    return (*env, run.compared, *arm_rank(run), run.seed, run.name)


def arm_rank(run):
    return (run.departures, *place(run.method, dmash.METHODS), run.arm)


def place(name, table):
    """To sort by: the place of a name in a table, or after all of these."""
    return [*table, name].index(name), name


def file_name(env):
    """An environment's name as part of a file's."""
    return env.replace(":", ".").replace("/", ".")


def group(items, key):
    groups = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def distinct(places):
    """The places as paths, in order; refused if one stands twice."""
    seen = {}
    for place in map(Path, places):
        same = place.resolve()
        if same.name == "policy.pt":
            same = same.parent
        if same in seen:
            raise BadInput(f"{place}: given twice")
        seen[same] = place
    return list(seen.values())


# ---- One file ----------------------------------------------------------------------------------


def read_table(path, numbers, texts=("run", "set"), key=("step",)):
    """The rows of a CSV file as dicts, without empty cells.

    Columns in `texts` stay text, or all with `texts=None`. The others hold numbers. Those in
    `numbers` must be there and finite. The last column of `key` rises among the rows that have the
    others in common.
    """
    line, rows, last = 1, [], {}
    data = path.read_bytes()
    try:
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        text = data.decode()
        if not text.endswith("\n"):
            raise ValueError("the last line is torn, or there is none")
        reader = csv.reader(io.StringIO(text, newline=""))
        head = next(reader)
        for name in (*key, *numbers):
            if name not in head:
                raise ValueError(f"no column {name}")
        for cells in reader:
            line = reader.line_num
            row = checked_row(head, cells, numbers, texts)
            *others, number = [row[name] for name in key]
            others = tuple(others)
            if others in last and number <= last[others]:
                raise ValueError(f"{key[-1]} {number} stands after {last[others]}")
            last[others] = number
            rows.append(row)
    except Exception as error:  # of a torn or foreign file
        raise BadInput(f"{path}, line {line}: {dmash.one_line(error)}") from None
    return rows


def checked_row(head, cells, numbers, texts):
    if len(cells) != len(head):
        raise ValueError(f"{len(cells)} cells under {len(head)} columns")
    row = {}
    for name, cell in zip(head, cells):
        if texts is None or name in texts:
            row[name] = cell
        elif cell:
            row[name] = float(cell)
    for name in numbers:
        if not math.isfinite(row.get(name, math.nan)):
            raise ValueError(f"{name} is no finite number")
    return row


# ---- Run folders -------------------------------------------------------------------------------


def read_runs(places):
    """All runs in the places, in an order that does not depend on theirs.

    A place is a folder with the three tables, a run folder, or a folder that holds some.
    """
    runs = []
    for place in map(Path, places):
        files = sorted(place.rglob("config.json"))
        if (place / TABLES[0]).exists():
            runs += read_tables(place)
        elif files:
            runs += [read_run(file.parent) for file in files]
        else:
            raise BadInput(f"{place}: no run there; allowed: folders of runs, or with runs.csv")
    refuse_doubles(runs)
    return sorted(runs, key=rank)


def of_experiments(runs, names):
    """The runs of these experiments, and those of run folders, which are of none."""
    known = {run.experiment for run in runs}
    for name in names:
        if name not in known:
            raise BadInput(f"no experiment {name!r}; known: {', '.join(sorted(known))}")
    return [run for run in runs if run.experiment in ("", *names)]


def refuse_doubles(runs):
    seen = {}
    for run in runs:
        same = (run.env, run.method, run.arm, run.seed, run.compared)
        if same in seen:
            raise BadInput(f"{run.place}, {run.name}: the same run as {seen[same].name}")
        seen[same] = run


def read_run(folder):
    """The run in a folder. Before its first evaluation it has no tables."""
    metrics = []
    if (folder / "metrics.csv").exists():
        metrics = read_table(folder / "metrics.csv", OF_METRICS)
    path = folder / "config.json"
    with dmash.reading(path):
        config = json.loads(path.read_text(encoding="utf-8"))
        texts = {name: as_text(value) for name, value in config.items()}
        name = os.fsencode(folder.resolve().name).decode("utf-8", "backslashreplace")
        run = new_run(name, "", texts, metrics, [], folder)
        at_end = run.at_end
    if at_end:
        path = folder / "per_context.csv"
        for row in read_table(path, ("step", "index", "return"), key=("step", "set", "index")):
            if row.pop("step") == run.steps:
                run.contexts.append(row)
        check_contexts(run, path)
    return run


def as_text(value):
    """A setting as text: the same for 1e-3 and .001, and empty for None and for off."""
    if isinstance(value, str):
        return value
    if value is None or value is False:
        return ""
    if type(value) in (int, float):
        return f"{value:.12g}"
    return json.dumps(value, sort_keys=True)


def new_run(name, experiment, texts, metrics, contexts, place):
    apart = (*UNTOLD, *VERSIONS, "run", "experiment")
    settings = {key: text for key, text in texts.items() if text and key not in apart}
    versions = {key: texts.get(key) or "unknown" for key in VERSIONS}
    for row in metrics:
        row["mean"] = sum(row[key] for key in SETS) / len(SETS)
    ids = name, experiment, texts["env"], texts["method"], int(texts["seed"])
    return Run(*ids, settings, versions, metrics, contexts, place)


def check_contexts(run, path):
    """The last evaluation has all contexts, numbered from 0, with the means of metrics.csv."""
    for name in SETS:
        rows = [row for row in run.contexts if row["set"] == name]
        if [row["index"] for row in rows] != list(range(int(run.settings["contexts"]))):
            where = f"{path}: {run.name}"
            raise BadInput(f"{where}: a context of {name} is missing at step {run.steps}")
        mean = sum(row["return"] for row in rows) / len(rows)
        if not run.at_end or not math.isclose(mean, run.last(name), rel_tol=1e-4, abs_tol=1e-4):
            raise BadInput(f"{path}: {run.name}: the mean of {name} is not that of metrics.csv")


# ---- The three tables --------------------------------------------------------------------------


def read_tables(folder):
    of_runs, of_metrics, of_contexts = [folder / name for name in TABLES]
    metrics = read_table(of_metrics, OF_METRICS, key=("run", "step"))
    metrics = group(metrics, lambda row: row.pop("run"))
    contexts = read_table(of_contexts, ("index", "return"), key=("run", "set", "index"))
    contexts = group(contexts, lambda row: row.pop("run"))
    runs = []
    for row in read_table(of_runs, (), texts=None, key=("run",)):
        name = row["run"]
        of_run = metrics.get(name, []), contexts.get(name, [])
        with dmash.reading(of_runs):
            run = new_run(name, row["experiment"], row, *of_run, folder)
        if run.finished:
            check_contexts(run, of_contexts)
        runs.append(run)
    return runs


def write_tables(folder, runs):
    """Writes the three tables; the same runs give the same bytes."""
    rows, metrics, contexts = [], [], []
    for run in sorted(runs, key=lambda run: run.name):
        ids = {"run": run.name, "experiment": run.experiment, "env": run.env, "method": run.method}
        rows.append(ids | {"seed": run.seed} | run.settings | run.versions)
        for row in run.metrics:
            metrics.append({"run": run.name} | row)
            del metrics[-1]["mean"]
        contexts += [{"run": run.name} | row for row in run.contexts]
    for name, table in zip(TABLES, (rows, metrics, contexts)):
        write_table(folder / name, table)


def write_table(path, rows):
    columns = dict.fromkeys(column for row in rows for column in row)
    full = [{column: plain(row.get(column, "")) for column in columns} for row in rows]
    data = dmash.csv_text(full).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)  # the whole table, or the old one


def plain(value):
    """A whole number as an integer, of which all digits are written."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value
