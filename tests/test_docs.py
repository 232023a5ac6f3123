"""What the pages and recipes tell people to type is taken; what they name is there."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from jaxhisto import cli, downstream_verbs
from jaxhisto.flags import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += [ROOT / "export" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The lines in studies are read in tests/study/test_study_file.py, with what they make.
RECIPES = sorted((ROOT / "configs").glob("*.toml"))

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"^    \S.*$", re.MULTILINE)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)]+)\)")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w(?![\w-])")
# What follows a verb, up to a comment, what a shell does next, or the quote around the whole.
WORDS = r"""((?:"[^"]*"|'[^']*'|[^"'#&;\n])*)"""
LINE = re.compile(r"\bjaxhisto ([a-z]+)(?![\w:/])" + WORDS)
BENCHMARK = re.compile(r"\bpython (benchmarks/\w+\.py)" + WORDS)
PYTEST = re.compile(r"\bpytest\b([^`\n]*)")
NAMED = re.compile(
    r"\b(?:docs|benchmarks|tests|jaxhisto|export|configs)/[\w{},./-]*\.(?:md|png|py|json|toml)"
)
RECORD = re.compile(r"(?<![\w{}-])[a-z][\w-]*-\d{4}-\d\d-\d\d\.json")
# Of pip, Slurm, gcloud, TFDS, vips, Beam and XLA, and of every verb.
FOREIGN = {"--gpus-per-node", "--gpus-per-task", "--ntasks-per-node", "--cpus-per-task", "--nodes"}
FOREIGN |= {"--signal", "--requeue", "--kill-on-bad-exit", "--zone", "--worker", "--command"}
FOREIGN |= {
    "--xla_force_host_platform_device_count",
    "--file_format",
    "--tile",
    "--pyramid",
    "--runner",
    "--help",
    "--debug",
    "--no-deps",
}
# Where something is left out, as in `jaxhisto pretrain ... --seed 1`.
LEFT_OUT = {"pretrain": ["--data.stores", "STORE", "--out", "RUN"]}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def typed(page: Path) -> str:
    """What is there to be copied: code blocks, or a recipe's comments; broken lines joined."""
    if page.suffix == ".toml":
        blocks = re.findall(r"^# {3}(.*)$", text(page), re.MULTILINE)
    else:
        blocks = [body for kind, body in FENCED.findall(text(page)) if kind in ("", "python")]
        blocks += INDENTED.findall(FENCED.sub("", text(page)))
    return "\n".join(blocks).replace("\\\n", " ")


def spoken(page: Path) -> list[str]:
    """What a sentence sets as code, which need not be all that is to be typed."""
    return [" ".join(piece.split()) for piece in INLINE.findall(FENCED.sub("", text(page)))]


def lines() -> list[tuple[str, str]]:
    """(verb, the rest) of each whole line, once."""
    found = {
        (verb, " ".join(rest.split())): None
        for page in (*PAGES, *RECIPES)
        for verb, rest in LINE.findall(typed(page))
    }
    return list(found)


class Parsed(Exception):
    """Ends a verb where it would read its settings."""


def settings(verb: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class of a verb's settings."""

    def stop(cls: Any, *_: Any, **__: Any) -> None:
        raise Parsed(cls)

    for module in (cli, downstream_verbs):
        monkeypatch.setattr(module, "parse", stop)
    with pytest.raises(Parsed) as stopped:
        cli.VERBS[verb]([])
    return stopped.value.args[0]


def flags(cls: Any, prefix: str = "") -> Iterator[str]:
    """Every flag that stands for a field, groups by their names too (`--task`)."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        flag = prefix + str(field.metadata.get("flag", field.name)).replace("_", "-")
        yield f"--{flag}"
        if hints[field.name] is bool:
            group, _, last = flag.rpartition(".")
            yield f"--{group}{'.' if group else ''}no-{last}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags(hints[field.name], f"{flag}.")


@pytest.fixture
def every_flag(monkeypatch):
    return {verb: set(flags(settings(verb, monkeypatch))) for verb in cli.VERBS}


@pytest.mark.parametrize(("verb", "rest"), lines())
def test_a_line_is_taken(monkeypatch, verb, rest):
    def stop(*args: Any, **kwargs: Any) -> None:
        raise Parsed(parse(*args, **kwargs))

    for module in (cli, downstream_verbs):
        monkeypatch.setattr(module, "parse", stop)
    words = shlex.split(rest.replace("$i", "0"))
    if words[:1] == ["..."]:
        words = LEFT_OUT[verb] + words[1:]
    with pytest.raises(Parsed):
        cli.VERBS[verb](words)


def test_lines_are_found():
    verbs = {verb for verb, _ in lines()}
    assert len(lines()) > 40
    assert {"tile", "pretrain", "export", "verify", "study", "bench"} <= verbs


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_verbs_and_flags_that_a_page_speaks_of_exist(page, every_flag):
    scripts = (ROOT / "benchmarks").glob("*.py")
    known = set.union(FOREIGN, *every_flag.values(), *(options(script) for script in scripts))
    known |= options(ROOT / "export" / "jaxhisto_export" / "__main__.py")
    for piece in (*spoken(page), *typed(page).splitlines()):
        wrong = set(FLAG.findall(piece)) - known
        assert not wrong, (piece, wrong)
        for verb, rest in LINE.findall(piece):
            assert verb in cli.VERBS, piece
            wrong = set(FLAG.findall(rest)) - every_flag[verb] - {"--help", "--debug"}
            assert not wrong, (piece, wrong)
        for script, rest in BENCHMARK.findall(piece):
            wrong = set(FLAG.findall(rest)) - options(ROOT / script)
            assert not wrong, (piece, wrong)


def options(script: Path) -> set[str]:
    return set(re.findall(r'"(--[a-z][\w-]*)"', text(script)))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_links_of_a_page_exist(page):
    for link in LINK.findall(text(page)):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for path in NAMED.findall(" ".join((*spoken(page), typed(page)))):
        for file in braces(path):
            assert (ROOT / file).exists(), file
    for record in RECORD.findall(text(page)):
        assert (ROOT / "benchmarks" / "records" / record).exists(), record


def braces(path: str) -> list[str]:
    """`a{1,2}b` -> a1b, a2b."""
    found = re.search(r"\{([^}]*)\}", path)
    if not found:
        return [path]
    return [path[: found.start()] + one + path[found.end() :] for one in found[1].split(",")]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tests_that_a_page_runs_exist(page):
    for rest in PYTEST.findall(" \n".join((*spoken(page), typed(page)))):
        words = shlex.split(rest)
        files = [ROOT / word for word in words if word.startswith("tests/")]
        if not files:
            continue
        source = "".join(text(file) for file in files)
        if "-k" in words:
            assert re.search(rf"def test_\w*{words[words.index('-k') + 1]}", source), rest
        if "-m" in words:
            assert f"mark.{words[words.index('-m') + 1]}" in source, rest
