"""Results side by side, and pictures of the worst and the best cases.

    python -m eval.report results.json                                        # a table, as Markdown
    python -m eval.report a.json b.json --out report.html --markdown report.md --worst 8

The page is one file without scripts that needs no network. Pictures are drawn anew, so those that results name by their
path must still be there.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from tap_llm.errors import InputError

from .base import Case, cases_path
from .case_drawing import draw_case
from .command import cli, positive
from .tables import cell

SHOWN = 8
_COLOURS, _SAMPLE = 256, 160
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1em 0; font-size: 14px; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
table.about td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
div.cases { display: grid; grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); gap: 1.2em; }
figure { margin: 0; border: 1px solid #ddd; padding: .6em; }
figure img { max-width: 100%; display: block; }
figcaption { font-size: 13px; overflow-wrap: anywhere; white-space: pre-line; }
.missing, .faults { color: #a00; }
"""

Row = list[str]


@dataclass(frozen=True)
class Results:
    """A results file and its cases.

    Attributes:
        path: of the results.
        found: what the file holds.
        cases: of `extremes`.
    """

    path: Path
    found: dict[str, Any]
    cases: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Results:
        """Raises [`InputError`] for a file that is missing, damaged or something else."""
        found, cases = _read_json(path), cases_path(path)
        if not isinstance(found, dict) or not {"protocol", "metrics", "model", "faults"} <= found.keys():
            raise InputError(f"{path} holds no results of a benchmark")
        return cls(path, found, _read_json(cases) if cases.is_file() else [])

    @property
    def model(self) -> str:
        """As the user called it; of a run with --limit that says so."""
        name, limit = str(self.found["model"].get("name", self.path.stem)), self.found.get("limit")
        return name if limit is None else f"{name}, first {limit} only"

    @property
    def classes(self) -> dict[str, Any]:
        """The metric of each class, where the benchmark tells them apart."""
        classes = self.found["metrics"].get("classes")
        known = classes if isinstance(classes, Mapping) else {}
        return {name: next(iter(values.values()), None) for name, values in known.items()}

    @property
    def overall(self) -> dict[str, Any]:
        """All other metrics."""
        return {name: value for name, value in self.found["metrics"].items() if name != "classes" or not self.classes}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the results in {path}: {error}") from error


# Tables


def tables(results: Sequence[Results]) -> dict[str, list[Row]]:
    """A table per protocol: its head, and a row per result and group of metrics.

    Metrics that no result has are left out; what only some have is "-" for the others. Models of one name are told
    apart by their files. Classes one by one have a table of their own.
    """
    found = {}
    for protocol in dict.fromkeys(one.found["protocol"] for one in results):
        chosen = [one for one in results if one.found["protocol"] == protocol]
        found[protocol] = _table(chosen)
        if any(one.classes for one in chosen):
            found[f"{protocol}, by class"] = _class_table(chosen)
    return found


def _names(results: Sequence[Results]) -> list[str]:
    """Of the models; with the file where one name occurs twice."""
    models = Counter(one.model for one in results)
    return [one.model if models[one.model] == 1 else f"{one.model} ({one.path.stem})" for one in results]


def _class_table(results: Sequence[Results]) -> list[Row]:
    """A row per class, a column per result."""
    names = dict.fromkeys(name for one in results for name, value in one.classes.items() if value is not None)
    return [["class", *_names(results)], *([name, *(cell(one.classes.get(name)) for one in results)] for name in names)]


def _table(results: Sequence[Results]) -> list[Row]:
    rows = [
        (one, name, group, values)
        for one, name in zip(results, _names(results), strict=True)
        for group, values in groups_of(one.overall)
    ]
    names = dict.fromkeys(metric for *_, values in rows for metric in values if values[metric] is not None)
    lines = [
        [name, group, *(cell(values.get(metric)) for metric in names), str(len(one.found["faults"]))]
        for one, name, group, values in rows
    ]
    table = [["model", "group", *names, "faults"], *lines]
    return table if any(group for _, _, group, _ in rows) else [[row[0], *row[2:]] for row in table]


def groups_of(metrics: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The innermost dicts of nested metrics, by their path."""
    values = {key: value for key, value in metrics.items() if not isinstance(value, Mapping)}
    if values or not metrics:
        yield path, values
    for key, value in metrics.items():
        if isinstance(value, Mapping):
            yield from groups_of(value, f"{path}, {key}" if path else key)


def markdown(results: Sequence[Results]) -> str:
    """All tables, and how many faults there are."""
    return "\n".join(
        f"### {_plain(protocol)}\n\n{_markdown_table(table)}\n" for protocol, table in tables(results).items()
    )


def _markdown_table(table: Sequence[Row]) -> str:
    head, *rows = [[_plain(text) for text in row] for row in table]
    rule = ["---" if name in ("model", "group", "class") else "---:" for name in table[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is, on one line."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")


# The page


def page(results: Sequence[Results], shown: int = SHOWN) -> str:
    """One HTML file: tables, where the numbers come from, faults, and the worst and the best cases.

    Args:
        results: at least one.
        shown: cases of each group, of the worst and of the best.
    """
    parts = [f"<h2>{escape(protocol)}</h2>{_html_table(table)}" for protocol, table in tables(results).items()]
    parts += [part for one in results for part in _about(one, shown)]
    head = f'<meta charset="utf-8"><title>Results</title><style>{_STYLE}</style>'
    return (
        f"<!doctype html>\n<html><head>{head}</head><body>\n<h1>Results</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_table(table: Sequence[Row]) -> str:
    head, *rows = table
    lines = [_html_row(head, "th"), *(_html_row(row, "td") for row in rows)]
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _html_row(row: Iterable[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in row)}</tr>"


def _about(one: Results, shown: int) -> Iterator[str]:
    """Where a result comes from, its faults and its cases."""
    yield f"<h2>{escape(one.model)}: {escape(one.found['protocol'])}</h2>"
    yield f'<table class="about">{"".join(_html_row(row, "td") for row in _origin(one))}</table>'
    if one.found["faults"]:
        lines = "".join(f"<li>{escape(str(fault))}</li>" for fault in one.found["faults"])
        yield f'<h3>Faults</h3><ul class="faults">{lines}</ul>'
    for group in one.cases:
        for title in ("worst", "best"):
            chosen = group[title][:shown]
            if chosen:
                heading = f"{title} {len(chosen)} of {group['cases']}"
                name = f"{group['group']}: {heading}" if group["group"] else heading.capitalize()
                yield f"<h3>{escape(name)}</h3>"
                yield f'<div class="cases">{"".join(map(_figure, chosen))}</div>'


def _origin(one: Results) -> Iterator[Row]:
    """Facts about a run, as rows of a name and a text."""
    found, model = one.found, one.found["model"]
    yield ["file", str(one.path)]
    yield ["model", f"{model.get('name')}, {model.get('parameters', '?')} parameters, {model.get('dtype', '?')}"]
    yield ["hash of the weights", str(model.get("sha256", "unknown"))]
    yield ["hash of the data", str(found.get("data", {}).get("sha256", "unknown"))]
    yield ["examples", f"{found.get('examples')}; {found.get('examples_unusable', 0)} more could not be used"]
    speed = {key: value for key, value in found.get("speed", {}).items() if isinstance(value, (int, float))}
    yield ["speed", ", ".join(f"{value} {key.replace('_per_second', '/s')}" for key, value in speed.items()) or "-"]
    yield ["processes", str(found.get("processes", 1))]
    yield ["versions", ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())]
    yield ["command", " ".join(map(str, found.get("command", [])))]
    yield from (["not measured", f"{name}: {reason}"] for name, reason in found.get("not_measured", {}).items())


def _figure(case: Case) -> str:
    """A case with its picture, or the reason why there is none."""
    try:
        picture = f'<img alt="" src="{png(case)}">'
    except InputError as error:
        picture = f'<p class="missing">{escape(str(error))}</p>'
    words = f"<b>{escape(cell(case['score']))}</b> {escape(case['title'])}\n{escape(case.get('text', ''))}"
    return f"<figure>{picture}<figcaption>{words}</figcaption></figure>"


def png(case: Case) -> str:
    """The picture of a case as a `data:` URI; few colours keep it small.

    Raises:
        InputError: it cannot be drawn.
    """
    drawn, packed = draw_case(case), io.BytesIO()
    colours = drawn.resize((_SAMPLE, _SAMPLE)).quantize(_COLOURS)  # of the whole picture it would take long
    drawn.quantize(palette=colours, dither=Image.Dither.NONE).save(packed, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(packed.getvalue()).decode()}"


# The command


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Raises:
        InputError: a file that cannot be read or written.
    """
    args = _parser().parse_args(arguments)
    results = [Results.read(path) for path in args.results]
    table = markdown(results)
    print(table)
    if args.markdown is not None:
        _write(args.markdown, table)
    if args.out is not None:
        _write(args.out, page(results, args.worst))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="results files of one or more benchmarks")
    parser.add_argument("--out", type=Path, help="HTML page to write")
    parser.add_argument("--markdown", type=Path, help="Markdown file to write")
    parser.add_argument("--worst", type=positive, default=SHOWN, metavar="N", help="cases of each kind [8]")
    return parser


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(cli(main))
