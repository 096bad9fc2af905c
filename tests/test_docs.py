"""The documentation: links lead somewhere, code runs, commands, settings and files that it names exist."""

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import subprocess
import sys
from importlib import resources
from pathlib import Path
from string import Template
from types import SimpleNamespace
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler

from egrpo_fast.cli import parse
from egrpo_fast.config import Config, load_config
from egrpo_fast.config.loading import _field_names
from egrpo_fast.config.reference import reference
from egrpo_fast.methods import METHODS
from egrpo_fast.schedule import make_schedule

ROOT = Path(__file__).parents[1]
SOURCES = [*(ROOT / "egrpo_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)]+)\)")
COMMAND = re.compile(r"(?:^|[;&|]\s*|\bdo\s+)(?:\w+=\S+\s+)*((?:egrpo|make|python|pytest)\s[^;&|]*)")
DOTTED = re.compile(r"(?<![\w/.])(\w+)\.(\w+)((?:\.\w+)*)(?![\w*/])")
PHASES = ("rollout", "decode", "rewards", "update")
SUFFIXES = {"py", "md", "txt", "json", "jsonl", "yaml", "html", "csv", "cu", "h"}
OUR_FILE = re.compile(r"(?:tests|docs|benchmarks|egrpo_fast|csrc|kernels)/[\w./-]+")


def by_page(pages):
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


every_page = pytest.mark.parametrize("page", by_page(PAGES))


def blocks(page, language):
    """(first line, text) of every fenced block in a language."""
    text = page.read_text()
    return [(text[: found.start(2)].count("\n"), found[2]) for found in FENCE.finditer(text) if found[1] == language]


def prose(page):
    return FENCE.sub("", page.read_text())


def spans(page):
    """Inline code, on one line."""
    return [" ".join(span.split()) for span in INLINE.findall(prose(page))]


def anchors(page):
    """Of every heading, as GitHub makes them."""
    made = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", LINK.sub("", heading).lower()).strip().replace(" ", "-")
        made.append(f"{slug}-{made.count(slug)}" if slug in made else slug)
    return made


@every_page
def test_links_lead_somewhere(page):
    for target in LINK.findall(INLINE.sub("", prose(page))):
        if target.startswith("http"):
            parts = urlsplit(target)
            assert parts.scheme in ("http", "https") and "." in (parts.hostname or ""), target
            assert not re.search(r"\s|[.,;]$", target), target
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_relative_to(ROOT) and there.exists(), target
        assert not anchor or anchor in anchors(there), target


@every_page
def test_every_block_is_of_a_language_that_is_looked_at(page):
    text = page.read_text()
    assert {found[1] for found in FENCE.finditer(text)} <= {"", "sh", "python", "yaml", "math", "mermaid"}
    assert "```" not in FENCE.sub("", text), "a block that does not end"


@every_page
def test_images_are_images(page):
    for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", prose(page)):
        assert (page.parent / target).read_bytes().startswith(b"\x89PNG"), target


def given(page, folder):
    """What the blocks of a page take for granted: names, and files in the working directory."""
    if page.name == "methods.md":
        run = folder / "runs" / "shapes"
        run.mkdir(parents=True)
        spreads = {step: 0.2 - 0.01 * step for step in range(8)}
        (run / "metrics.jsonl").write_text(json.dumps({"spread_by_step": {"shapes_soft": spreads}}) + "\n")
    if page.name == "flux.md":
        pipe = SimpleNamespace(scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0))
        return {"pipe": pipe, "FlowMatchEulerDiscreteScheduler": FlowMatchEulerDiscreteScheduler}
    return {}


SHORT_RUNS = """
from egrpo_fast import api
whole = api.load_config
short = ["iterations=1", "schedule.num_steps=4", "rollout.group_size=3", "evaluation.num_prompts=1"]
api.load_config = lambda recipe, settings: whole(recipe, [*settings, *short])
losses, brightness = [], lambda images, prompts: images.mean((1, 2, 3))
"""
"""Before a page's program that trains: it does as it says, for one small iteration."""


@pytest.mark.parametrize("page", by_page(page for page in PAGES if blocks(page, "python")))
def test_python_runs(page, tmp_path, monkeypatch):
    """The blocks of a page one after the other, as one program; a traceback names the page's line."""
    if "Trainer(" in "".join(code for _, code in blocks(page, "python")):
        program = SHORT_RUNS + "".join(code for _, code in blocks(page, "python"))
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=1800
        )
        assert run.returncode == 0, run.stderr[-3000:]
        return
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page.stem} | given(page, tmp_path)
    with patch.dict(METHODS):  # a page's own method is known to that page alone
        for line, code in blocks(page, "python"):
            exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", by_page(page for page in PAGES if blocks(page, "yaml")))
def test_yaml_is_part_of_a_recipe(page, tmp_path):
    recipe = yaml.safe_load((resources.files("egrpo_fast.recipes") / "shapes.yaml").read_text())
    for line, text in blocks(page, "yaml"):
        file = tmp_path / f"line-{line}.yaml"
        file.write_text(yaml.safe_dump(recipe | yaml.safe_load(text)))
        load_config(str(file))


def commands(page):
    """Argument lists of every command in a shell block; `...` stands for the arguments of the one before."""
    shell = [text for language in ("sh", "") for _, text in blocks(page, language)]
    indented = "\n".join(re.findall(r"^    (\S.*)$", prose(page), re.MULTILINE))
    variables, before = {}, {}
    for line in "\n".join((*shell, indented)).replace("\\\n", " ").splitlines():
        variables |= re.findall(r"^(\w+)=(\S+)", line) + re.findall(r"\bfor (\w+) in (\w+)", line)
        for text in COMMAND.findall(line.strip()):
            words = shlex.split(Template(text).safe_substitute(variables), comments=True)
            if "..." in words:
                place = words.index("...")
                words[place : place + 1] = [word for word in before[words[0]] if word not in words]
            before[words[0]] = words
            yield words


def check_command(words):
    """Whether the program would take these arguments. AssertionError, ConfigError, or SystemExit of its parser."""
    program, *arguments = words
    if program == "egrpo":
        parsed = parse(arguments)
        if arguments[0] in ("plan", "train"):
            load_config(parsed.recipe, parsed.overrides)
    elif program == "make":
        values = dict(word.split("=", 1) for word in arguments if "=" in word)
        targets = " ".join(re.findall(r"^([a-z -]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)).split()
        assert {word for word in arguments if "=" not in word} <= set(targets)
        if values and arguments[0] in ("train", "plan"):
            load_config(values.get("RECIPE", "shapes"), shlex.split(values.get("ARGS", "")))
    elif arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1])
    else:  # python FILE, pytest FILE...
        files = [ROOT / word for word in arguments if word.endswith(".py") or word.startswith("tests/")]
        assert all(file.exists() for file in files)
        for option in (word for word in arguments if program == "python" and word.startswith("--")):
            assert f'"{option}"' in files[0].read_text() or files[0].name == "setup.py", option


@pytest.mark.parametrize("page", by_page(page for page in PAGES if list(commands(page))))
def test_commands_are_accepted(page):
    for words in commands(page):
        try:
            with contextlib.redirect_stderr(io.StringIO()) as told:
                check_command(words)
        except (SystemExit, AssertionError, ValueError) as error:
            pytest.fail(f"{shlex.join(words)}: {told.getvalue() or error!r}")


@every_page
def test_what_is_named_in_passing_exists(page):
    """Inline code: commands and their options, make targets, files of the repository."""
    for span in spans(page):
        program, *words = span.split()
        if program == "egrpo" and words:
            with contextlib.redirect_stdout(io.StringIO()) as told, pytest.raises(SystemExit) as ended:
                parse([words[0], "--help"])
            assert ended.value.code == 0, f"{span}: no such command"
            assert all(word in told.getvalue() for word in words if word.startswith("--")), f"{span}: no such option"
        elif (program == "make" and words) or re.match(r"python (-m \w|benchmarks/)", span):
            check_command(shlex.split(span))
        if OUR_FILE.fullmatch(span) and not span.endswith(".so"):  # built, not kept
            # A wheel holds kernels/ as egrpo_fast/kernels/.
            assert (ROOT / span).exists() or (ROOT / span.removeprefix("egrpo_fast/")).exists(), f"no file {span}"


def bound(body):
    """Names that the statements of a module or class bind."""
    for part in body:
        targets = getattr(part, "targets", None) or getattr(part, "names", [getattr(part, "target", part)])
        yield from (name for target in targets if (name := getattr(target, "id", getattr(target, "name", None))))


@pytest.fixture(scope="module")
def defined():
    """Package, module, class or section -> the names in it."""
    names = {}
    for path in SOURCES:
        tree, place = ast.parse(path.read_text()), path.parent if path.stem == "__init__" else path
        names.setdefault(place.parent.name, set()).add(place.stem)
        names.setdefault(place.stem, set()).update(bound(tree.body))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                names.setdefault(node.name, set()).update(bound(node.body))
    for setting in _field_names(Config):
        section, _, field = setting.partition(".")
        names.setdefault(section, set()).add(field)
    return names


@every_page
def test_dotted_names_are_defined(page, defined):
    """In inline code and diagrams: settings, and what modules and classes hold."""
    for text in (*spans(page), *(image for _, image in blocks(page, "mermaid"))):
        for head, name, rest in DOTTED.findall(text.replace("egrpo_fast.", "")):
            if head in defined and name not in SUFFIXES:
                assert name in defined[head] or name + rest in defined[head], f"{text}: no {head}.{name}{rest}"


def test_the_configuration_reference_is_what_the_configuration_says():
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), "stale: run `make docs`"


def test_every_setting_has_its_line_in_the_reference():
    listed = re.findall(r"^\| `([\w.\[\]]+)` \|", reference(), re.MULTILINE)
    leaves = {
        name for name in _field_names(Config) if not any(other.startswith(f"{name}.") for other in _field_names(Config))
    }
    assert {name.replace("[]", "") for name in listed} == leaves


def test_the_image_of_the_rooms_is_what_the_imports_are_held_to():
    spec = importlib.util.spec_from_file_location("architecture", Path(__file__).with_name("test_architecture.py"))
    held = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(held)
    page = ROOT / "docs" / "architecture.md"
    image = blocks(page, "mermaid")[0][1]
    floors = [
        tuple(re.findall(r"\w+", floor))
        for floor in re.findall(r"subgraph floor\d+ .*?\]\n(.*?)end\n", image, re.DOTALL)
    ]
    assert [set(floor) for floor in floors] == [set(floor) for floor in held.ROOMS]
    known = {(module.split(".")[1], package) for package, modules in held.KNOWN_TO.items() for module in modules}
    assert set(re.findall(r"(\w+) -\.- (\w+)", image)) == known
    table = " ".join(spans(page))
    assert all(re.search(rf"\b{room}(\.py|/)", table) for floor in held.ROOMS for room in floor)


def test_the_readme_is_short():
    lines = [line for line in prose(ROOT / "README.md").splitlines() if not line.startswith(("|", "!["))]
    assert len(re.sub(r"\]\([^)]*\)", "]", " ".join(lines)).split()) <= 800


def test_the_figures_of_an_iteration_are_the_recorded_ones():
    results = ROOT / "benchmarks" / "results"
    recorded, on_gpu = (json.loads((results / f"iteration-{device}.json").read_text()) for device in ("cpu", "gpu"))
    page = (ROOT / "docs" / "performance.md").read_text()
    for told in (*recorded.values(), *on_gpu.values()):
        for name, row in told["variants"].items():
            calls = row["calls"] + row["calls_with_gradient"]
            seconds = " | ".join(f"{row['seconds'][phase]:.2f}" for phase in (*PHASES, "all"))
            evaluations = f"{row['evaluations']:,} + {row['evaluations_with_gradient']}"
            ratios = f"{row['ratio']:.1f} | {row['rollout_ratio']:.1f} | {row['share_of_peak']:.0%}"
            assert f"| {name} | {calls:,} | {evaluations} | {seconds} | {ratios} | {row['peak_mib']:,.0f} |" in page


def test_the_figures_of_the_measured_spread_are_the_recorded_ones():
    recorded = json.loads((ROOT / "benchmarks" / "results" / "spread.json").read_text())
    schedule, merged, plain = make_schedule(), *(recorded["thresholds"][threshold] for threshold in ("2.2", "0.0"))
    assert merged["merges"] == [schedule.merges[step] for step in recorded["steps"]] and set(plain["merges"]) == {1}
    soft = [[sum(column) / len(column) for column in zip(*found["spread"]["shapes_soft"])] for found in (merged, plain)]
    at_merged = [(one, other) for one, other, length in zip(*soft, merged["merges"]) if length > 1]
    gains, spreads = [one - other for one, other in at_merged], [other for _, other in at_merged]
    text = " ".join(prose(ROOT / "docs" / "algorithm.md").split())
    assert f"{recorded['prompts']} captions" in text
    for values in (gains, spreads):
        assert f"{min(values):.3f} to {max(values):.3f}" in text
