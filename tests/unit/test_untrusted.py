"""Nothing in the package runs what a file says: no unsafe unpickling and no evaluation of text."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("fairseq_stack", "scripts", "examples") for path in (ROOT / folder).rglob("*.py"))
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def dangers(source):
    """Lines of Python that could run what a file holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            if any(name.split(".")[0] in UNPICKLES for name in names):
                found.append(node.lineno)
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        if (
            function in RUNS_CODE
            or (function == "torch.load" and options.get("weights_only") != "True")
            or (function.startswith("yaml.") and "load" in function and "safe" not in function)
            or options.get("allow_pickle", "False") != "False"
            or options.get("trust_remote_code", "False") != "False"
            or options.get("shell", "False") != "False"
            or function in ("os.system", "os.popen")
        ):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_could_run_what_a_file_holds(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "eval(cfg.layers)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "import pickle",
        "from joblib import load",
        "yaml.load(text)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
    ],
)
def test_the_search_finds_what_it_looks_for(line):
    assert dangers(line) == [1]
