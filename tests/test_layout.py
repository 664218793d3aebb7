# Copyright 2026 The ModernALBERT authors. Licensed under the Apache License, Version 2.0; see LICENSE.
"""Which room may import which, without circles; what travels to the Hub, what the wheel holds, what moved."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_models import REPOSITORY

from modernalbert.cli.moved_modules import MOVED_MODULES


HUB_FILES = {
    "configuration_modernalbert",
    "modeling_modernalbert",
    "modeling_mol",
    "mol_backends",
    "mol_grouped",
    "mol_triton",
}
SCRIPTS = {"hub", "upcycle", "run_glue", "run_ner", "run_pretraining", "run_retrieval", "run_squad"}
MODEL = {"configuration_modernalbert", "modeling_modernalbert", "modeling_mol", "mol_backends"}
# Room or root module -> what it may import beside itself. `__init__` stands for `import modernalbert`.
MAY_IMPORT = {
    "cli": set(),
    "data": {"cli"},
    "configuration_modernalbert": set(),
    "mol_backends": set(),
    "mol_grouped": {"mol_backends"},
    "mol_triton": {"mol_backends"},
    "modeling_mol": {"mol_backends"},
    "modeling_modernalbert": {
        "configuration_modernalbert",
        "modeling_mol",
        "mol_backends",
        "mol_grouped",
        "mol_triton",
    },
    # Below merging, whose report writes Hub folders.
    "export": {"cli", *MODEL},
    "merging": {"cli", "export", *MODEL},
    "tuner": {"cli", "export", "merging", *MODEL},
    "merge_experts": {"cli", "export", "merging", "tuner", *MODEL},
    "training": {"cli", "data", "export", *MODEL},
    "upcycling": {"cli", "training", *MODEL},
    "__init__": {"cli", "export", "tuner", "upcycling", *MODEL},
    "evaluation": {"cli", "data"},
    "diagnostics": {"cli", "export", "merging", "merge_experts", "tuner", *MODEL},
    "question_answering": {"cli"},
    "finetuning": {
        "cli",
        "data",
        "diagnostics",
        "evaluation",
        "export",
        "merging",
        "merge_experts",
        "training",
        *MODEL,
    },
}
BELOW_SCRIPTS = set(MAY_IMPORT)
MAY_IMPORT |= dict.fromkeys(SCRIPTS, BELOW_SCRIPTS)
MAY_IMPORT |= {"benchmarks": BELOW_SCRIPTS, "experiments": BELOW_SCRIPTS | {"benchmarks", "run_glue"}}


def module_files() -> dict[str, Path]:
    """Modules of the package by dotted name below `modernalbert`."""
    folders = [REPOSITORY, *(REPOSITORY / room for room in MAY_IMPORT), REPOSITORY / "experiments" / "study"]
    files = [file for folder in folders for file in folder.glob("*.py") if file != REPOSITORY / "setup.py"]
    names = [".".join(file.relative_to(REPOSITORY).with_suffix("").parts) for file in files]
    return {name if name == "__init__" else name.removesuffix(".__init__"): file for name, file in zip(names, files)}


def imports_of(name: str, files: dict[str, Path]) -> set[str]:
    """The modules of this package that a module imports, inside functions too."""
    found = set()
    package = [] if name == "__init__" else name.split(".")
    if files[name].name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(files[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
            origins = [(path.removeprefix("modernalbert").lstrip("."), "") for path in paths if _is_ours(path)]
        elif isinstance(node, ast.ImportFrom) and (node.level or _is_ours(node.module)):
            base = (node.module or "") if node.level else node.module.removeprefix("modernalbert").lstrip(".")
            base = ".".join(filter(None, [*package[: len(package) + 1 - node.level], base])) if node.level else base
            origins = [(base, alias.name) for alias in node.names]
        else:
            continue
        for base, member in origins:
            path = f"{base}.{member}".strip(".")
            found.add(path if path in files else base or "__init__")
    return found


def _is_ours(path: str) -> bool:
    return path.partition(".")[0] == "modernalbert"


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    files = module_files()
    graph = {name: imports_of(name, files) for name in files}
    assert {target for targets in graph.values() for target in targets} <= set(files)
    return graph


def test_rooms_import_what_the_table_allows(graph):
    rooms = {name.partition(".")[0] for name in graph}
    assert rooms == set(MAY_IMPORT)
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph.items()
        for target in targets
        if (room := name.partition(".")[0]) != (other := target.partition(".")[0]) and other not in MAY_IMPORT[room]
    ]
    assert wrong == []


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """The names along some circle; empty if there is none."""
    done, path = set(), []

    def visit(name: str) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        path.append(name)
        for target in sorted(graph[name]):
            if circle := visit(target):
                return circle
        done.add(path.pop())
        return []

    return next(filter(None, map(visit, sorted(graph))), [])


def test_no_module_imports_itself_by_way_of_others(graph):
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert find_circle(graph) == []
    assert find_circle({room: targets - {room} for room, targets in MAY_IMPORT.items()}) == []


def test_what_travels_to_the_hub_imports_no_peft():
    written = {file.stem for file in (REPOSITORY / "checkpoints/modernalbert-nano").glob("*.py")}
    assert written == HUB_FILES
    for name in HUB_FILES:
        tree = ast.parse((REPOSITORY / f"{name}.py").read_text("utf-8"))
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [module for module in modules if module.partition(".")[0] in ("peft", "modernalbert")], name
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in HUB_FILES, f"{name} imports {node.module}, which does not travel"


def test_few_files_lie_at_the_root():
    assert len(list(REPOSITORY.glob("*.py"))) <= 18


def test_the_tree_of_the_architecture_names_every_file():
    text = (REPOSITORY / "ARCHITECTURE.md").read_text("utf-8")
    tree = re.search(r"```text\n(.*?)```", text, flags=re.DOTALL)[1]
    room, named = "", []
    for line in tree.splitlines():
        name = line.split()[0]
        if name.endswith("/"):
            room = name
        else:
            assert len(line.split()) > 1, f"{name} has no description"
            named.append(f"{room}{name}" if line.startswith(" ") else name)
    folders = {*MAY_IMPORT, ".", "experiments/study", "model_cards", "space", "docs/images"}
    files = {file for folder in folders for file in REPOSITORY.glob(f"{folder}/*.py")}
    expected = {
        str(file.relative_to(REPOSITORY)) for file in files if file.parent == REPOSITORY or file.stem != "__init__"
    }
    assert sorted(named) == sorted(expected)
    hub_files = {line.split(".py")[0] for line in tree.splitlines() if line.endswith("[Hub]")}
    assert hub_files == HUB_FILES


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


IMPORT = """
import json, os, sys

def refuse_network(event, arguments):
    assert event not in ("socket.connect", "socket.getaddrinfo"), arguments

os.environ.pop("HF_HUB_OFFLINE", None)
sys.addaudithook(refuse_network)
import modernalbert
print(json.dumps(list(sys.modules)))
"""


def test_importing_the_package_loads_no_training_code_and_asks_no_other_machine():
    loaded = json.loads(run_python(IMPORT))
    rooms = {name.split(".")[1] for name in loaded if name.startswith("modernalbert.")}
    assert rooms >= {"modeling_modernalbert", "tuner"}
    assert rooms & {"training", "finetuning", "data", "evaluation", "diagnostics"} == set()


WITHOUT_PEFT = """
{broken}
import modernalbert, torch, transformers
from modernalbert import *
config = ModernALBERTConfig(vocab_size=64, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, **{ids})
print(ModernALBERTModel(config)(torch.ones(1, 5, dtype=torch.int64))[0].shape)
try:
    modernalbert.MoLConfig
except ImportError as error:
    print("said:", error)
"""


@pytest.mark.parametrize(
    "broken, reason",
    [
        ("import sys; sys.modules['peft'] = None", "import of peft halted"),
        ("import peft.tuners._buffer_dict as module; del module.BufferDict", "cannot import name 'BufferDict'"),
    ],
)
def test_without_a_working_peft_there_are_models_and_one_warning(broken, reason):
    ids = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    output = run_python(WITHOUT_PEFT.format(broken=broken, ids=ids))
    assert "torch.Size([1, 5, 32])" in output
    assert output.count("Models load and run without it.") == 1 and reason in output
    assert "said: modernalbert.MoLConfig needs peft, which cannot be used" in output


LOAD_SHIPPED = """
import os, sys
sys.path.insert(0, sys.argv[1])
import modernalbert, transformers
from modernalbert import run_glue
assert modernalbert.__file__.startswith(sys.argv[1]), modernalbert.__file__
folder = os.path.join(sys.argv[1], "modernalbert", "checkpoints", "modernalbert-nano")
for options in ({}, {"trust_remote_code": True}):
    print(type(transformers.AutoModelForMaskedLM.from_pretrained(folder, **options)).__name__)
"""


def test_the_wheel_holds_what_is_imported_or_run(tmp_path):
    pytest.importorskip("setuptools")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    package = tmp_path / "modernalbert"
    built = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
    rooms = set(MAY_IMPORT) - {"benchmarks", "experiments"}
    code = {file for name, file in module_files().items() if name.partition(".")[0] in rooms}
    assert {name for name in built if name.endswith(".py")} == {str(file.relative_to(REPOSITORY)) for file in code}
    assert {"checkpoints/modernalbert-nano/model.safetensors", "configs/tiny/config.json", "LICENSE"} <= built
    done = subprocess.run(
        [sys.executable, "-c", LOAD_SHIPPED, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["ModernALBERTForMaskedLM"] * 2, done.stderr


@pytest.mark.parametrize("old", sorted(MOVED_MODULES))
def test_a_moved_import_path_names_the_new_one(old, graph):
    with pytest.raises(ImportError, match=rf"^modernalbert\.{old} moved to modernalbert\.{MOVED_MODULES[old]}\.$"):
        importlib.import_module(f"modernalbert.{old}")
    assert set(MOVED_MODULES[old].replace(" and ", ", ").split(", ")) <= set(graph)


def test_what_never_existed_is_not_said_to_have_moved():
    with pytest.raises(ModuleNotFoundError, match="No module named 'modernalbert.merge_adaptor'"):
        importlib.import_module("modernalbert.merge_adaptor")
