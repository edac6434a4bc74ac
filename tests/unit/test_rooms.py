"""A room of the package imports only rooms below it."""

import ast

from training import ROOT

PACKAGE = ROOT / "fairseq_stack"
# From the ground up.
ROOMS = (
    "errors", "files", "tables", "extensions", "registry", "growth", "criterions", "models", "checkpoints", "targets",
    "data", "teachers", "training", "tasks", "export", "analysis", "evaluation", "experiment", "benchmark", "doctor", "cli",
)  # fmt: skip


def imports(module):
    """The names that a module imports, also inside functions. Imports for type checkers alone do not count."""
    waiting = [ast.parse(module.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            # `from fairseq_stack import cli` imports a room, too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        waiting += ast.iter_child_nodes(node)


def upward():
    """The imports from a room above, as pairs (module, imported name)."""
    for module in sorted(PACKAGE.rglob("*.py")):
        if module.parent == PACKAGE and module.stem.startswith("__"):
            continue  # the package itself: register() and `python -m`
        room = module.relative_to(PACKAGE).with_suffix("").parts[0]
        for name in imports(module):
            package, *parts = name.split(".")
            if package == "fairseq_stack" and parts and parts[0] not in ("register", "__version__", "__file__"):
                assert parts[0] in ROOMS, f"{module} imports {name}, which is in no room"
                if ROOMS.index(parts[0]) > ROOMS.index(room):
                    yield module.relative_to(ROOT).as_posix(), name


def test_a_room_imports_only_rooms_below_it():
    assert list(upward()) == []
