"""The house itself: imports run one way, the core needs no extra, the package is whole, nothing unpickles."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlip import assets, recipes

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "qlip"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A room imports only from rooms further down; rooms of one row know nothing of each other.
ROOMS = (
    ["cli"],
    ["app"],
    ["serve"],
    ["hf"],
    ["um3", "vlm", "t2i"],
    ["training"],
    ["evaluation"],
    ["archive"],
    ["data"],
    ["lm"],
    ["tokens"],
    ["modeling"],
    ["runtime"],
    ["recipes"],
    ["assets"],
    ["registry"],
    ["files"],
    ["errors"],
)
FLOOR = {room: -row for row, rooms in enumerate(ROOMS) for room in rooms}
HANDED_ON = "modeling"  # what `from qlip import QLIPModel` reaches

CORE = {
    "torch": "torch",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "tokenizers": "tokenizers",
    "PIL": "pillow",
    "numpy": "numpy",
    "typer": "typer",
    "rich": "rich",
    "filelock": "filelock",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
}
EXTRAS = {
    "tensorboard": "train",
    "wandb": "train",
    "matplotlib": "train",
    "sklearn": "eval",
    "jinja2": "eval",
    "transformers": "hf",
    "diffusers": "hf",
    "ftfy": "hf",
    "peft": "lora",
    "pyarrow": "tables",
    "ray": "archive",
    "fsspec": "remote",
    "tenacity": "remote",
    "onnx": "export",
    "onnxscript": "export",
    "constriction": "tokens",
    "faiss": "archive",
    "resvg_py": "icons",
}
NAMED_OTHERWISE = {
    "sklearn": "scikit-learn",
    "faiss": "faiss-cpu",
    "resvg_py": "resvg-py",
}
"""Modules whose distribution has another name."""
# The one file with an unpickler, which makes arrays and refuses all else (tests/data/public/test_lpips.py).
ARRAYS_ALONE = "src/qlip/data/public/lpips.py:"
UNWANTED = "torchvision timm transformers pandas skimage IPython scipy torchmetrics onnxruntime".split()

LARGEST_FOLDER = 20
"""Modules in one folder, besides its ``__init__``."""

IMPORTED_AT_ONCE = {"hf": "transformers"}
"""Rooms whose modules subclass an optional package's classes; their ``__init__`` asks for it first."""
IMPORTED_BY = {"vlm/lmms/model.py": "lmms_eval", "um3/lm_eval.py": "lm_eval"}
"""Plugins: modules that another package imports, and that package, which is in no extra."""

# Packages of extras that no line of the source names, and the package that loads them.
LOADED_BY = {"tensorboard": "torch.utils.tensorboard", "onnx": "onnxscript", "s3fs": "fsspec", "gcsfs": "fsspec"}

# How no docstring and no help text begins, and words that the source does not use.
BEGINNINGS = re.compile(r"(Of|What|Whether|Where|The same|So many)\b")
WORDS = re.compile(r"pictur|\banew\b|\bnobody\b|\bwhatever\b|\bgoes on\b", re.IGNORECASE)
STORED = (
    '"pictures"',
    '"log.pictures',
    "``pictures/",
    "    pictures/  ",
    '"picture"',
    '"GeneratedPictures"',
    "a 3d picture of",
)
"""Names in files and folders of version 0.1, of columns, and captions, which stay."""

CIRCLES: set[str] = set()
"""Import circles inside a room that are still to be undone; the list only shrinks."""


def room_of(path: Path) -> str:
    """The first folder below the package, or the module itself."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, whether it runs when the module is imported) of every import in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    later = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.name, node.lineno, node not in later
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written out, from qlip on"
            for name in node.names:
                yield f"{node.module}.{name.name}", node.lineno, node not in later


def named(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_imports_run_one_way() -> None:
    wrong = []
    for path in SOURCES:
        room = room_of(path)
        if room in ("__init__", "__main__"):
            continue
        assert room in FLOOR, f"{path.relative_to(ROOT)}: the room {room!r} is not in the order of rooms"
        for name, line, _ in imports_of(path):
            parts = name.split(".")
            if parts[0] != "qlip":
                continue
            target = parts[1] if parts[1] in FLOOR else HANDED_ON
            if target != room and FLOOR[target] >= FLOOR[room]:
                wrong.append(f"{named(path, line)}: {room} imports {target}")
    assert not wrong, "\n".join(wrong)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Modules of the package, and what each imports from it: inside functions too, but not for type checkers alone."""
    modules = {module_of(path): path for path in SOURCES}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        only_typed = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for inner in ast.walk(node)
        }
        imports = [node for node in ast.walk(tree) if node not in only_typed]
        names = [one.name for node in imports if isinstance(node, ast.Import) for one in node.names]
        names += [f"{n.module}.{one.name}" for n in imports if isinstance(n, ast.ImportFrom) for one in n.names]
        graph[module] = set()
        for name in names:
            while name and name not in modules:  # a name inside a module
                name = name.rpartition(".")[0]
            if name not in ("", "qlip", module):
                graph[module].add(name)
    return graph


def circles(graph: dict[str, set[str]]) -> set[str]:
    """Sets of modules that reach each other, as sorted names in one string."""

    def reached(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            for name in graph.get(waiting.pop(), ()):
                if name not in found:
                    found.add(name)
                    waiting.append(name)
        return found

    reach = {module: reached(module) for module in graph}
    groups = (
        {other for other in found if module in reach[other]} for module, found in reach.items() if module in found
    )
    return {", ".join(sorted(group)) for group in groups}


def test_imports__no_circle_inside_a_room() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == {"b, c"}
    found = circles(import_graph())
    assert not found - CIRCLES, "\n".join(found - CIRCLES)


def test_trainer_knows_no_images_and_no_tokenizer() -> None:
    """Outside `tasks` and `studies`, training imports no data, and of modeling only what any model has."""
    any_model = ("qlip.modeling.parts.", "qlip.modeling.transformer.Block", "qlip.modeling.reduce.")
    wrong = []
    for path in sorted((PACKAGE / "training").rglob("*.py")):
        first = path.relative_to(PACKAGE / "training").parts[0]
        if first in ("tasks", "studies"):
            continue
        for name, line, _ in imports_of(path):
            if name.startswith(("qlip.data", "qlip.tokens", "qlip.archive", "qlip.evaluation")) or (
                name.startswith(("qlip.modeling", "qlip.QLIP")) and not name.startswith(any_model)
            ):
                wrong.append(f"{named(path, line)}: imports {name}")
    assert not wrong, "\n".join(wrong)


def test_kinds_in_pyproject_are_those_that_a_source_tree_knows() -> None:
    from qlip.training.job import GROUP, OURS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == OURS


def test_other_packages_are_core_or_behind_an_extra() -> None:
    wrong = []
    for path in SOURCES:
        for name, line, at_once in imports_of(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top in {"qlip", "__future__"} or top in CORE:
                continue
            if IMPORTED_BY.get(path.relative_to(PACKAGE).as_posix()) == top:
                continue
            if top not in EXTRAS:
                wrong.append(f"{named(path, line)}: {top} is in no list of dependencies")
            elif at_once and IMPORTED_AT_ONCE.get(room_of(path)) != top:
                wrong.append(f"{named(path, line)}: {top} comes with an extra; import it where it is used")
    assert not wrong, "\n".join(wrong)


def test_pyproject_declares_what_is_imported_and_constraints_pin_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distribution = re.compile(r"[A-Za-z0-9._-]+")

    def names(requirements: list[str]) -> set[str]:
        found = (distribution.match(requirement) for requirement in requirements)
        return {match.group().lower().replace("_", "-") for match in found if match and match.group() != "qlip"}

    assert names(project["dependencies"]) == {name.lower().replace("_", "-") for name in CORE.values()}
    extras = project["optional-dependencies"]
    for module, extra in EXTRAS.items():
        assert NAMED_OTHERWISE.get(module, module) in names(extras[extra]), f"{module} is not in the extra {extra}"
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pins = {name.lower().replace("_", "-") for name in pinned}
    wanted = names(project["dependencies"]).union(*(names(requirements) for requirements in extras.values()))
    assert wanted <= pins, f"not pinned: {sorted(wanted - pins)}"
    assert pinned["torch"] == "2.13.0"


def test_extras__every_package_is_used_by_the_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    used = set(re.findall(r"^\s*(?:import|from) (\w[\w.]*)", sources, re.MULTILINE))
    used |= set(re.findall(r"""require\(\s*"(\w[\w.]*)""", sources))
    used |= {name.split(".")[0] for name in used}
    modules = {distribution: module for module, distribution in NAMED_OTHERWISE.items()}
    unused = [
        f"{extra}: {name}"
        for extra, requirements in project["optional-dependencies"].items()
        for requirement in requirements
        if extra not in ("all", "dev") and (name := re.split(r"[\[<>=~ ]", requirement)[0]) != "qlip"
        if LOADED_BY.get(name, modules.get(name, name)) not in used
    ]
    assert not unused, f"no module imports it: {unused}"


def test_the_core_imports_without_extras_and_brings_nothing_heavy() -> None:
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted([*EXTRAS, *UNWANTED])!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import qlip
loaded = {{name.split(".")[1] for name in sys.modules if name.startswith("qlip.")}}
assert not loaded & {{"cli", "training", "evaluation", "data", "tokens"}}, loaded
import qlip.tokens, qlip.cli.main
assert not any(name.startswith("qlip.training") for name in sys.modules)
import qlip.data
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


NEEDS = {
    "embed --text cat -o OUT/x.parquet": ("pyarrow", "tables"),
    "tokenize IMAGES -o OUT/tokens": ("pyarrow", "archive"),
    "train nano/debug-stage1 -o OUT/run": ("tensorboard", "train"),
    "train nano/debug-stage1 log.tensorboard=false log.wandb=qlip -o OUT/run": ("wandb", "train"),
    "recipe probe nano/debug-stage1 -o OUT/probe": ("matplotlib", "train"),
    "eval -o OUT/result": ("jinja2", "eval"),
    "eval generated IMAGES --reference cifar10:test -o OUT/result": ("jinja2", "eval"),
    "eval --data cifar10:test --probe cifar10:train": ("sklearn", "eval"),
    "eval --model diffusers.AutoencoderKL:x/y --data IMAGES": ("diffusers", "hf"),
    "compare IMAGES -o OUT/comparison": ("jinja2", "eval"),
    "export --format onnx -o OUT/onnx": ("onnx", "export"),
    "export --format transformers -o OUT/hf": ("transformers", "hf"),
    "tokenize https://example.org/a.tar -o OUT/tokens": ("pyarrow", "archive"),
}
"""A command, the first package that it lacks where only the core is installed, and the extra that brings it."""
LIKE_THE_CORE = """
import sys
from importlib.machinery import PathFinder
class Core:
    find_distributions = staticmethod(PathFinder.find_distributions)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)
absent, images, out, *commands = eval(sys.argv[1])
sys.meta_path = [Core() if finder is PathFinder else finder for finder in sys.meta_path]
from qlip.cli.main import run
for command in commands:
    code = run([word.replace("IMAGES", images).replace("OUT", out) for word in command.split()])
    print(code, file=sys.stderr)
"""


def test_commands__name_an_absent_extra_in_one_line_before_the_work(tmp_path: Path) -> None:
    given = repr([EXTRAS, str(PACKAGE / "assets" / "images"), str(tmp_path), *NEEDS])
    program = [sys.executable, "-c", LIKE_THE_CORE, given]
    cache = os.environ | {"QLIP_CACHE": str(tmp_path / "empty")}  # nothing of this machine decides
    ran = subprocess.run(program, capture_output=True, text=True, check=False, cwd=ROOT, env=cache)
    lines = ran.stderr.splitlines()
    assert len(lines) == 2 * len(NEEDS), ran.stderr
    for command, (package, extra), line, code in zip(NEEDS, NEEDS.values(), lines[::2], lines[1::2], strict=True):
        said = f'qlip: this needs the package {package!r}: pip install -e ".[{extra}]"'
        assert line.startswith(said) and code == "1", (command, line)
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_no_file_is_longer_than_one_idea() -> None:
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {name: lines for name, lines in long.items() if lines > 600}


def test_folders__no_longer_than_20_modules() -> None:
    folders = {path.parent for path in SOURCES}
    sizes = {str(one.relative_to(ROOT)): len(list(one.glob("[!_]*.py"))) for one in folders}
    assert not {name: size for name, size in sizes.items() if size > LARGEST_FOLDER}


def texts_of(path: Path) -> Iterator[tuple[str, int]]:
    """(text, line) of every docstring and help text in a file, of attributes too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        text = (
            node.value if isinstance(node, ast.Expr) or (isinstance(node, ast.keyword) and node.arg == "help") else None
        )
        if isinstance(text, ast.JoinedStr):
            text = text.values[0]
        if isinstance(text, ast.Constant) and isinstance(text.value, str):
            yield text.value.strip(), text.lineno


def test_language__plain_english() -> None:
    wrong = []
    for path in (*SOURCES, *PACKAGE.rglob("*.yaml")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for stored in STORED:
                line = line.replace(stored, "")
            wrong += [f"{named(path, number)}: says {found[0]!r}" for found in WORDS.finditer(line)]
        for text, number in texts_of(path) if path.suffix == ".py" else ():
            if found := BEGINNINGS.match(text):
                wrong.append(f"{named(path, number)}: begins with {found[0]!r}")
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles() -> None:
    wrong = []
    for path in SOURCES:
        for name, line, _ in imports_of(path):
            if name == "pickle.UnpicklingError":  # an error to catch, which loads nothing
                continue
            if named(path, line).startswith(ARRAYS_ALONE) and name == "pickle":
                continue
            if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}:
                wrong.append(f"{named(path, line)}: imports {name}")
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            tensors_only = called == "torch.load" and given.get("weights_only") == "True"
            if called.endswith(("torch.load", "torch.save")) and not tensors_only:
                wrong.append(f"{named(path, node.lineno)}: {called}; use safetensors")
            if any(word.arg == "allow_pickle" and ast.unparse(word.value) != "False" for word in node.keywords):
                wrong.append(f"{named(path, node.lineno)}: allow_pickle")
    assert not wrong, "\n".join(wrong)


def test_text_files__are_read_and_written_as_utf_8() -> None:
    """Without an encoding Windows takes another, which spoils names and captions."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or any(word.arg == "encoding" for word in node.keywords):
                continue
            called = ast.unparse(node.func)
            modes = [ast.literal_eval(word) for word in node.args[1:2] if isinstance(word, ast.Constant)]
            if called.endswith((".read_text", ".write_text")) and "distribution(" not in called:
                wrong.append(f"{named(path, node.lineno)}: {called}")
            if called == "open" and not any("b" in mode for mode in modes):
                wrong.append(f"{named(path, node.lineno)}: open")
    assert not wrong, "\n".join(wrong)


def tracked_texts() -> Iterator[tuple[str, str]]:
    """(name, text) of every text file that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path != Path(__file__).resolve():
            try:
                yield name, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_file_names_a_machine_or_a_registry() -> None:
    forbidden = re.compile(
        r"/work/|/root/|/home/\w|(?<![\w$.])/tmp/|pypi\.org|pythonhosted|registry\.npmjs|npmjs\.org|deb\.debian\.org"
        r"|index-url|\.\./shared|\bissue #?\d"
    )
    wrong = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in tracked_texts()
        for number, line in enumerate(text.splitlines(), start=1)
        if forbidden.search(line)
    ]
    assert not wrong, "\n".join(wrong)


def test_demo_images__are_small_and_have_licences() -> None:
    licences, images = assets.path("images", "LICENSES.md").read_text(), list(assets.path("images").glob("*.jpg"))
    assert images and "`drawings/*.png`" in licences
    for path in images:
        assert f"| {path.name} |" in licences
        assert path.stat().st_size <= 60 * 1024


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_all_that_runs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("qlip/")}
        outside = {name.split("/")[0] for name in archive.namelist()} - {"qlip"}
        size = sum(info.compress_size for info in archive.infolist())
    files = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {f"qlip/{path.relative_to(PACKAGE).as_posix()}" for path in files}
    assert all(name.endswith(".dist-info") for name in outside)
    assert {"qlip/py.typed", "qlip/assets/templates/imagenet.txt", "qlip/assets/configs/QLIP-B-16-256.json"} <= names
    assert {f"qlip/recipes/{name}.yaml" for name in recipes.names()} <= names
    assert size < 44_000_000


def test_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python, command = home / "bin" / "python", home / "bin" / "qlip"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*install, str(wheel)], check=True)
    # The heavy packages are borrowed from this environment. A path in a .pth does not run that folder's own .pth files,
    # so the checkout, which is installed editable there, stays out of reach.
    (site,) = (home / "lib").glob("python*/site-packages")
    borrowed = {str(Path(module.__file__ or "").parents[1]) for module in (__import__("torch"), __import__("typer"))}
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")

    work = tmp_path / "elsewhere"
    work.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str | Path) -> str:
        ran = subprocess.run(
            [str(argument) for argument in arguments],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    where = Path(run(python, "-c", "import qlip; print(qlip.__file__)").strip())
    assert where.is_relative_to(site)
    images = where.parent / "assets" / "images"
    run(command, "encode", images, "-o", "tokens")
    run(command, "decode", "tokens", "-o", "rebuilt")
    assert sorted(path.stem for path in (work / "rebuilt").glob("*.png")) == sorted(
        path.stem for path in images.glob("*.jpg")
    )
    assert "%" in run(command, "classify", images / "cat.jpg", "--labels", "cat, truck")
    assert "1 image in" in run(command, "draw", "a red circle above a blue square", "-o", "drawn.png")
    # the command for each of them, in one process: starting one takes longer than the command
    infos = (
        "from qlip import recipes; from qlip.cli.main import run; print([run(['info', n]) for n in recipes.names()])"
    )
    assert run(python, "-c", infos).splitlines()[-1] == str([0] * len(recipes.names()))
    assert str(PACKAGE.parent) not in run(python, "-c", "import sys; print(sys.path)")
    shutil.rmtree(home)
