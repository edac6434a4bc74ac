"""What the documentation names exists: linked files and headings, paths, recipes, commands and fields."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "examples/README.md"]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in [*PAGES, *sorted((ROOT / "docs").glob("*.md"))]}
FOLDERS = ("docs", "examples", "fairseq_stack", "hydra_plugins", "scripts", "tests")
COMMANDS = {path.stem.replace("_", "-") for path in (ROOT / "fairseq_stack/cli").glob("[a-z]*.py")} - {"quiet"}
FIELDS = set(
    re.findall(r"^\| `([a-z_.]+)` \|", PAGES["docs/configuration.md"].read_text(encoding="utf-8"), re.MULTILINE)
)
pages = pytest.mark.parametrize("page", PAGES)


def text_of(page):
    return PAGES[page].read_text(encoding="utf-8")


def without_code(text, language=""):
    return re.sub(rf"^```{language}.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path):
    """The names by which links find the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text_of(page))):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        path = PAGES[page].parent / name if name else PAGES[page]
        assert path.exists(), target
        assert not heading or heading in anchors(path), target


@pages
def test_paths_of_the_repository_exist(page):
    text = text_of(page)
    for path in re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./-]+", text):
        assert (ROOT / path.rstrip(".")).exists() or "FOLDER" in path, path
    names = re.findall(r"`(?:[a-z_]+/)*([a-z_]+\.(?:py|sh))`", text) if page != "CHANGELOG.md" else []
    for name in names:
        assert any(next((ROOT / folder).rglob(name), None) for folder in FOLDERS), name


@pages
def test_recipes_exist(page):
    text = text_of(page)
    examples = ROOT / "examples"
    for folder, name in re.findall(r"--config-dir examples/([a-z_]+) --config-name ([a-z_]+)", text):
        assert (examples / folder / f"{name}.yaml").exists(), name
    folders = "|".join(path.name for path in examples.iterdir() if path.is_dir())
    for name in re.findall(rf"`((?:{folders})/\w+)`", text):
        assert (examples / name).with_suffix(".yaml").exists(), name


@pages
def test_commands_and_fields_exist(page):
    text = text_of(page)
    commands = re.findall(r"fairseq-stack ((?!COMMAND)[a-z][a-z-]+)", text)
    assert set(commands) <= COMMANDS
    if page != "docs/finetuning.md":  # about fairseq's own task and model
        fields = re.findall(r"(?<![\w./])(?:task|model|criterion)\.[a-z_]+\b(?![*(])", without_code(text, "python"))
        assert {field for field in fields if not field.endswith("_")} <= FIELDS
