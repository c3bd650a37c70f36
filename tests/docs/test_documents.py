"""What the documents say about names, defaults and files is what the code has."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from pydantic import TypeAdapter

from onebase_adapters.errors import AdapterError, InvalidMerge
from onebase_adapters.peft_lora import HONOURED
from onebase_server.cli import app
from onebase_server.errors import ConfigurationError, OnebaseError
from onebase_server.model.families import FAMILIES
from onebase_server.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDERS = (".", "docs", "deploy", "adapters_store/demo")
DOCUMENTS = sorted(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    """From a heading of the second level to the next."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of a section's one table, without its head."""
    table = [line for line in text.splitlines() if line.startswith(("| ", "|---"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def anchors(path: Path) -> set[str]:
    """A document's headings as GitHub turns them into anchors."""
    headings = HEADING.findall(FENCE.sub("", path.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def leaves(root: type[Any]) -> set[type[Any]]:
    return set().union(*map(leaves, root.__subclasses__())) if root.__subclasses__() else {root}


def test_operations_lists_every_setting_with_its_default_and_its_help():
    documented = rows(section(read("docs/operations.md"), "Settings"))
    assert [name.strip("`") for name, _, _ in documented] == list(Settings.model_fields)
    for (name, default, text), field in zip(documented, Settings.model_fields.values(), strict=True):
        assert text == field.description, name
        if field.is_required():
            assert default == "needed", name
        elif field.get_default() is None:
            assert default == "", name
        else:
            value = TypeAdapter(field.annotation).validate_python(default.strip("`").replace("~", str(Path.home())))
            assert value == field.get_default(), name


def test_the_api_document_names_every_metric(metric_families):
    text = read("docs/api.md")
    names = [family.name + ("_total" if family.type == "counter" else "") for family in metric_families]
    assert [name for name in names if f"`{name}" not in text] == []


def test_operations_names_only_metrics_that_there_are(metric_families):
    known = {family.name + ("_total" if family.type == "counter" else "") for family in metric_families}
    assert set(re.findall(r"`((?:onebase_|vllm:)\w+)`", read("docs/operations.md"))) <= known


def test_the_api_document_names_every_error_code_that_a_client_can_get():
    text = read("docs/api.md")
    errors = (leaves(OnebaseError) | leaves(AdapterError)) - {ConfigurationError, InvalidMerge}
    assert sorted(error.code for error in errors if f"`{error.code}`" not in text) == []


def test_the_models_document_lists_every_family():
    documented = rows(section(read("docs/models.md"), "Families"))
    assert [name.strip("`") for name, _, _ in documented] == list(FAMILIES)


def test_the_readme_lists_every_command():
    documented = {name.strip("`") for name, _ in rows(section(read("README.md"), "Commands"))}
    commands = typer.main.get_command(app).commands
    assert documented == {f"onebase {name}" for name in commands}


def test_everything_in_the_readmes_tree_exists():
    tree = section(read("README.md"), "The repository").partition("```\n")[2].partition("```")[0]
    parent = ROOT
    for line in tree.splitlines():
        is_inside = line.startswith("  ")
        names = line.strip().partition("  ")[0]
        for name in names.split(", "):
            assert ((parent if is_inside else ROOT) / name).exists(), line
        if not is_inside:
            parent = ROOT / names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(document):
    for link in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tests_that_a_document_names_exist(document):
    text = document.read_text(encoding="utf-8")
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    tests = set(re.findall(r"def (test_\w+)", "\n".join(sources.values())))
    assert set(re.findall(r"`(test_\w+)(?:\[[^`]*\])?`", text)) <= tests
    assert {ROOT / name for name in re.findall(r"`(tests/[\w/]+\.py)`", text)} <= sources.keys()


def test_the_kinds_in_the_adapters_document_are_those_that_are_compared_with_peft():
    kinds = section(read("docs/adapters.md"), "What is carried").partition("### Kinds that change linears")[2]
    table = kinds.partition("\n### ")[0].partition("\nThe two forms")[0]
    named = {name for row in rows(table) for name in re.findall(r"`([^`]+)`", row[-1])}
    compared = read("tests/end_to_end/test_adapter_kinds.py").partition("FUSED_KINDS")[0]
    assert named <= set(re.findall(r'"([^"\n]+)"', compared))
    assert set(re.findall(r'^    "([^"\n]+)": lambda', compared, re.MULTILINE)) - named <= {"some layers", "exclusions"}


def test_the_adapters_document_names_every_option_of_lora_that_has_an_effect():
    text = section(read("docs/adapters.md"), "What is carried")
    assert sorted(option for option in HONOURED if not re.search(rf"`{option}\b", text)) == []


def test_each_row_of_what_adapters_can_be_names_its_test():
    text = read("docs/adapters.md")
    for heading in ("What is carried", "Merging several into one"):
        for table in re.findall(r"(?:^\|.*\n)+", section(text, heading), re.MULTILINE):
            head = table.partition("\n")[0].strip("|").split("|")[-1].strip()
            assert head.startswith(("test", "in the test", "held against PEFT")), table
            for row in rows(table):
                assert re.search(r"`[^`]+`|the same", row[-1]), row
