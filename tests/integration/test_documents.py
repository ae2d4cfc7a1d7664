"""What the documents show works as shown."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from functools import cache
from pathlib import Path

import click
import pytest
import typer
from format_samples import FORMAT, SAMPLES

import conclave.cli.main
from conclave.model.config import ModelConfig
from conclave.model.costs import costs_of
from conclave.server.scenario import read_scenario
from conclave.simulations.shipped import find

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PACKAGES = sorted(file.parent for file in ROOT.glob("*/__init__.py"))
FOLDERS = {folder.name for folder in PACKAGES} | {"benchmarks", "docs", "src", "tests"}
PAGES = (
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "RESULTS.md",
    *sorted(DOCS.rglob("*.md")),
)  # fmt: skip


def commands() -> list[str]:
    """Every line of a document that calls the command line, without its comment."""
    found = []
    for path in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))):
        text = path.read_text().replace("\\\n", " ")
        found += re.findall(r"^(conclave [^#\n]*)", text, re.MULTILINE)
    return found


@pytest.mark.parametrize("line", commands())
def test_the_commands_that_are_shown_can_be_parsed(line):
    """Parsed by the very command line, not run: names, arguments and options exist."""
    command, arguments = typer.main.get_command(conclave.cli.main.app), shlex.split(line)[1:]
    assert arguments
    with command.make_context("conclave", arguments) as context:
        while isinstance(command, click.Group):
            name, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(name, arguments, parent=context)


def test_the_example_of_private_training_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (DOCS / "private-training.md").read_text(), re.DOTALL)
    exec(compile(example, "private-training.md", "exec"), {})
    assert "'rdp'" in capsys.readouterr().out


def test_the_formats_that_are_shown_are_all_there_are_and_valid():
    examples = re.findall(r"```toml\n(.*?)```", (DOCS / "data.md").read_text(), re.DOTALL)
    formats = [tomllib.loads(example)["format"] for example in examples]
    assert {FORMAT.validate_json(json.dumps(shown)).kind for shown in formats} == {
        name.split(",")[0] for name in SAMPLES
    }


def test_the_model_that_is_shown_can_be_built():
    (example,) = re.findall(r"```toml\n(.*?)```", (DOCS / "models.md").read_text(), re.DOTALL)
    base = read_scenario(find("stdlib-text")).model.model_dump(mode="json", exclude_none=True)
    shown = tomllib.loads(example)["model"]
    config = ModelConfig.model_validate_json(json.dumps(base | shown | {"experts": base["experts"] | shown["experts"]}))
    assert costs_of(config).total > 0


def prose_of(page: Path) -> str:
    """A page without its blocks of code; of the changelog the newest section, for older ones speak of older names."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return "\n## ".join(text.split("\n## ")[:2]) if page.name == "CHANGELOG.md" else text


@cache
def sources() -> dict[Path, str]:
    """Every Python file of the repository, tests and benchmarks included."""
    files = (file for name in sorted(FOLDERS - {"src"}) for file in (ROOT / name).rglob("*.py"))
    return {file: file.read_text() for file in (*files, *ROOT.glob("*.py"))}


def defines(text: str, name: str) -> bool:
    return (
        re.search(rf"^\s*(?:class|def) {name}\b|^{name}\b|^    {name}:|\bimport .*\b{name}\b", text, re.MULTILINE)
        is not None
    )


def is_missing(name: str) -> bool:
    """Whether a name is that of a file, folder, test or module of this repository, and there is none."""
    path, _, test = name.partition("::")
    of_a_file = path.endswith(".py") or ("/" in path and path.split("/")[0] in FOLDERS)
    if re.fullmatch(r"[\w./-]+", path) and of_a_file:
        found = [ROOT / path] if "/" in path else [file for file in sources() if file.name == path]
        found = [file for file in found if file.exists()]
        begins = re.compile(rf"^def {re.escape(test.removesuffix('…'))}", re.MULTILINE)
        return not any(not test or begins.search(sources()[file]) for file in found)
    if not re.fullmatch(r"conclave(?:\.\w+)+", name):
        return False
    if any(f'getLogger("{name}")' in text for text in sources().values()):
        return False
    first, *rest = name.split(".")[1:]
    place = ROOT / first
    while rest and (place / rest[0]).is_dir():
        place /= rest.pop(0)
    if rest and (place / f"{rest[0]}.py").exists():
        place /= f"{rest.pop(0)}.py"
    text = sources().get(place if place.suffix else place / "__init__.py")
    return text is None or not all(defines(text, part) for part in rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    """Lexical: what stands in backticks and looks like a path, a test or a module of ours; no other name counts."""
    assert [name for name in re.findall(r"`([^`\n]+)`", prose_of(page)) if is_missing(name)] == []


@pytest.mark.parametrize(
    "name",
    [
        "privacy/ledgers/", "privacy/ledger/legder.py", "release_door.py", "test_node.py::test_the_owner_never…",
        "conclave.privacy.ledger.legder", "conclave.data.private_data.write_private", "conclave.nodes", "docs/none.md",
    ],
)  # fmt: skip
def test_the_check_of_names_flags_what_is_not_there(name):
    assert is_missing(name)


@pytest.mark.parametrize(
    "name",
    [
        "privacy/ledger/", "privacy/ledger/ledger.py", "release.py", "test_node.py::test_the_owner_decides",
        "conclave.privacy.ledger.ledger", "conclave.data.private_data.read_private", "conclave.node", "docs/ledger.md",
        "policy.releases", "fed/operator/", "--json", "conclave node check", "packed/int8",
    ],
)  # fmt: skip
def test_the_check_of_names_lets_good_and_other_names_pass(name):
    assert not is_missing(name)


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_links_of_a_page_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", prose_of(page)):
        place = (page.parent / target) if target else page
        assert place.exists(), target
        assert not anchor or anchor in anchors_of(place), f"{target}#{anchor}"


def test_every_page_is_in_the_index():
    index = DOCS / "README.md"
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([^)#]+\.md)", index.read_text())}
    assert set(DOCS.rglob("*.md")) - linked == {index}


def test_every_room_is_in_the_picture_of_the_folders():
    rooms = {file.parent for package in PACKAGES for file in package.rglob("__init__.py")}
    named = set(re.findall(r"`([\w/]+)/`", (DOCS / "architecture.md").read_text()))
    assert {room.relative_to(ROOT).as_posix() for room in rooms} - named == set()


def test_every_rule_that_is_cited_has_its_number():
    rules = {int(number) for number in re.findall(r"^### Rule (\d+)$", (DOCS / "privacy.md").read_text(), re.MULTILINE)}
    assert rules == set(range(1, len(rules) + 1))
    cited = re.compile(r"docs/privacy\.md, rules? (\d+)|rules? (\d+) of docs/privacy\.md", re.IGNORECASE)
    numbers = {int("".join(pair)) for text in sources().values() for pair in cited.findall(text)}
    assert numbers
    assert numbers - rules == set()
    assert [str(file) for file, text in sources().items() if re.search(r"PRIVACY\.?(md)? (rule|§)", text)] == []
