"""What prompts are read from: files, by their suffix, and data sets of the hub. Never guesses: refuses by name.

`.txt`, or no suffix    UTF-8 text with one prompt per line
`.jsonl`, `.ndjson`     one JSON object per line
`.json`                 the same, or one array of objects or strings
`.csv`, `.tsv`          a table under a header, as `csv` and Excel write it
`.parquet`              a table
`datasets:ORG/NAME:SPLIT`, `datasets:ORG/NAME/CONFIG:SPLIT`, `datasets:./FOLDER:SPLIT`
                        what `datasets.load_dataset` loads

Each suffix may have `.gz` behind it. Lines end by `\\n`, `\\r\\n` or `\\r`.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from egrpo_fast.files import open_regular

DATASETS = "datasets:"
LONGEST_LINE = 1 << 20
"""In characters."""
MOST_JSON, MOST_UNPACKED = 1 << 26, 1 << 32
"""Bytes of a JSON array, which is held in memory, and of what a .gz file unpacks to."""
NAME_IT = " (prompts.column, or --column, names it)"
Records = Iterator[tuple[int, Any]]
"""Numbers of lines, rows or entries, and what stands there in the place of a prompt."""


@contextmanager
def opened(source: str | Path | list[str]) -> Iterator[tuple[Callable[[str], Records], str]]:
    """What gives the records of a source for a column, and what a record is called. A list is its own records."""
    if isinstance(source, list):
        yield lambda _: enumerate(source, 1), "prompt"
        return
    name = str(source)
    if name.startswith(DATASETS):
        yield partial(_hub_rows, name), "row"
        return
    path = Path(name)
    packed = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if packed else path).suffix.lower()
    if suffix not in KINDS:
        raise ValueError(f"is of no kind that is read ({suffix}); there are: {', '.join(KINDS)[2:]}, each also .gz")
    with open_regular(path) as file, _unpacked(file) if packed else nullcontext(file) as plain:
        read, unit = KINDS[suffix]
        if suffix == ".json" and _starts_with_bracket(plain):
            read, unit = _json_array, "entry"
        yield partial(read, plain), unit


@contextmanager
def _unpacked(file: BinaryIO) -> Iterator[BinaryIO]:
    """The content of a gzip file as a file."""
    with tempfile.TemporaryFile() as plain:
        try:
            with gzip.open(file) as packed:
                while piece := packed.read(1 << 20):
                    plain.write(piece)
                    if plain.tell() > MOST_UNPACKED:
                        raise ValueError(f"unpacks to more than {MOST_UNPACKED:,} bytes")
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise ValueError("is no whole gzip file") from None
        plain.seek(0)
        yield plain


def _lines(file: BinaryIO, newline: str | None = None) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file. newline: as in `open`; `""` keeps the lines' ends as they are."""
    if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise ValueError("is UTF-16; save it as UTF-8")
    file.seek(0)
    with io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline) as text:
        for number in itertools.count(1):
            line = text.readline(LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > LONGEST_LINE:
                raise ValueError(f"holds more than {LONGEST_LINE:,} characters in line {number}")
            if "\0" in line:
                raise ValueError(f"is not text: a NUL character in line {number}")
            try:
                line.encode()
            except UnicodeEncodeError as error:  # what could not be decoded stands there as half a surrogate pair
                byte = ord(line[error.start]) & 0xFF
                raise ValueError(
                    f"is not UTF-8 (byte {byte:#x} at character {error.start + 1} of line {number})"
                ) from None
            yield number, line


def _text_lines(file: BinaryIO, column: str) -> Records:
    lines = ((number, prompt) for number, line in _lines(file) if (prompt := line.strip()))
    for place, (number, prompt) in enumerate(lines):
        if place == 0 and _is_json(prompt):
            raise ValueError(f"is JSON in line {number}; name it .json or .jsonl, and it is read as such")
        yield number, prompt


def _is_json(line: str) -> bool:
    """Whether a line is a JSON object or array, or the beginning of one that goes on in the next lines."""
    try:
        return line in ("[", "{") or (line[0] in "[{" and isinstance(json.loads(line), (dict, list)))
    except (ValueError, RecursionError):
        return False


class _TwiceError(ValueError):
    """A key that a JSON object has twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _TwiceError(f"holds {key!r} twice in one object in")
        found[key] = value
    return found


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_once)
    except _TwiceError as error:
        raise ValueError(f"{error} {where}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"holds no JSON in {where}") from None


def _field(record: Any, column: str, where: str) -> Any:
    if not isinstance(record, dict):
        raise ValueError(f"holds no JSON object in {where}")
    if column not in record:
        raise ValueError(f"lacks field {column!r} in {where}; there are: {', '.join(record) or 'none'}{NAME_IT}")
    return record[column]


def _json_lines(file: BinaryIO, column: str) -> Records:
    for number, line in _lines(file):
        if line := line.strip():
            yield number, _field(_json(line, f"line {number}"), column, f"line {number}")


def _starts_with_bracket(file: BinaryIO) -> bool:
    start = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()
    file.seek(0)
    return start.startswith(b"[")


def _json_array(file: BinaryIO, column: str) -> Records:
    content = file.read(MOST_JSON + 1)
    if len(content) > MOST_JSON:
        raise ValueError(f"is a JSON array of more than {MOST_JSON:,} bytes; write one object per line, as .jsonl")
    try:
        entries = _json(content.decode("utf-8-sig"), "it")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from None
    for number, entry in enumerate(entries, 1):
        yield number, entry if isinstance(entry, str) else _field(entry, column, f"entry {number}")


def _check_column(column: str, names: Sequence[str]) -> None:
    if names.count(column) != 1:
        message = "holds more than one" if column in names else "lacks"
        raise ValueError(f"{message} column {column!r}; there are: {', '.join(names) or 'none'}{NAME_IT}")


def _table(delimiter: str, file: BinaryIO, column: str) -> Records:
    rows = csv.reader((line for _, line in _lines(file, newline="")), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        _check_column(column, header)
        place, end = header.index(column), rows.line_num
        for row in rows:
            start, end = end + 1, rows.line_num
            if row and len(row) != len(header):
                raise ValueError(
                    f"holds {len(row)} fields in line {start}, its header {len(header)}; what contains a separator "
                    "stands in double quotes"
                )
            if row:
                yield start, row[place]
    except csv.Error as error:
        raise ValueError(f"is no table in line {rows.line_num}: {error}") from None


def _parquet(file: BinaryIO, column: str) -> Records:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise ValueError("is Parquet, and pyarrow is not installed; pip install pyarrow") from None

    try:
        with ParquetFile(file, page_checksum_verification=True) as table:
            _check_column(column, table.schema_arrow.names)
            batches = table.iter_batches(1024, columns=[column])
            yield from enumerate((value for batch in batches for value in batch.column(0).to_pylist()), 1)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
        raise ValueError(f"cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def _hub_rows(name: str, column: str) -> Records:
    """`datasets` downloads and keeps the whole split, all columns of it; of its rows one column is read."""
    asked = _DATASET.fullmatch(name)
    if asked is None:
        raise ValueError("is not datasets:ORG/NAME:SPLIT, datasets:ORG/NAME/CONFIG:SPLIT or datasets:./FOLDER:SPLIT")
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise ValueError("needs the package datasets; pip install 'egrpo_fast[datasets]'") from None

    try:
        rows = load_dataset(asked["folder"] or asked["id"], asked["config"], split=asked["split"])
    except Exception as error:  # its own, and those of every library that it reads files with
        raise ValueError(f"cannot be loaded: {' '.join(str(error).split())}") from None
    _check_column(column, rows.column_names)
    batches = rows.select_columns([column]).iter(1024)
    yield from enumerate((value for batch in batches for value in batch[column]), 1)


_DATASET = re.compile(
    DATASETS + r"(?:(?P<folder>[./][^:]*)|(?P<id>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<config>[\w.+-]+))?)"
    r":(?P<split>[\w.-]+(?:\[[\d:%]*\])?)"
)
KINDS: dict[str, tuple[Callable[[BinaryIO, str], Records], str]] = {
    "": (_text_lines, "line"),
    ".txt": (_text_lines, "line"),
    ".csv": (partial(_table, ","), "line"),
    ".tsv": (partial(_table, "\t"), "line"),
    ".json": (_json_lines, "line"),
    ".jsonl": (_json_lines, "line"),
    ".ndjson": (_json_lines, "line"),
    ".parquet": (_parquet, "row"),
}
"""Suffix -> reader, and what its records are called."""
