"""The rooms of the design: who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spark_nsfw

PACKAGE = Path(spark_nsfw.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

#: Floors from the ground up; nothing imports upwards, not even for annotations.
FLOORS = [
    ["errors", "schema", "hadoop", "webhdfs", "ahead", "storage", "files", "note", "ownership"],
    ["read"], ["score"], ["use"], ["spark"], ["dataset"], ["cli"],
]  # fmt: skip
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}
CORE = [
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in MODULES
    if path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    in (*FLOORS[0], "read", "score", "use")
]


def imported_by(path):
    """The modules that a file imports anywhere, for its annotations too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers_of(*modules):
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in MODULES
        if any(name.split(".")[: len(m.split("."))] == m.split(".")
               for name in imported_by(path) for m in modules)
    }  # fmt: skip


def module_name(path):
    parts = ["spark_nsfw", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def test_every_module_has_a_floor():
    for path in MODULES:
        if path.name != "__init__.py" or path.parent != PACKAGE:
            assert module_name(path).split(".")[1] in FLOOR_OF, path


@pytest.mark.parametrize("path", MODULES[1:], ids=module_name)
def test_nothing_imports_upwards(path):
    own = FLOOR_OF[module_name(path).split(".")[1]]
    for name in imported_by(path):
        if name.startswith("spark_nsfw."):
            assert FLOOR_OF.get(name.split(".")[1], own) <= own, name


def test_there_is_no_circle():
    names = {module_name(path) for path in MODULES}
    arrows = {
        module_name(path): (imported_by(path) & names) - {module_name(path), "spark_nsfw"}
        for path in MODULES
        if path.parent != PACKAGE or path.name != "__init__.py"
    }
    while arrows:
        leaves = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_is_short_enough_to_read(path):
    assert len(path.read_text().splitlines()) <= 400


def test_only_the_shell_imports_pyspark():
    shell = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.glob("spark/*.py")}
    assert importers_of("pyspark", "py4j") <= shell | {"dataset.py"}


def test_what_reads_and_what_sums_up_needs_no_torch():
    assert {name for name in importers_of("torch", "timm") if name.startswith("read/")} == set()
    assert importers_of("torch", "timm") <= {
        *(name for name in importers_of("torch", "timm") if name.startswith("score/")),
        "spark/worker.py",
    }


def test_only_pixels_decodes_images():
    assert importers_of("PIL") == {"score/pixels.py"}


def test_only_the_report_draws():
    assert importers_of("matplotlib", "jinja2") == {"use/charts.py", "use/page.py"}


def test_models_are_put_together_in_one_place():
    """The recipe says which."""
    both = importers_of("spark_nsfw.score.embedder") & importers_of("spark_nsfw.score.classifier")
    assert {name for name in both if name.startswith("score/")} == {"score/recipe.py"}


def test_reading_shards_needs_no_torch():
    script = (
        "import sys\n"
        "import spark_nsfw.spark.reader, spark_nsfw.spark.datasource\n"
        "heavy = {'torch', 'timm', 'PIL'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_the_core_runs_without_pyspark_and_java(detector_path):
    script = f"""
import sys
sys.modules["pyspark"] = None  # every import of it fails
from importlib import import_module
for name in {CORE!r}:
    import_module("spark_nsfw." + name)
from spark_nsfw import NsfwClassifier, TimmImageEmbedder
from examples.photographs import encode, photographs
embedder = TimmImageEmbedder("test_vit2", embedding_size=768)
embeddings = embedder.embed([encode(next(photographs()))], device="cpu")
scores = NsfwClassifier(model_path={detector_path!r}).classify(embeddings, device="cpu")
assert embeddings.shape == (1, 768) and scores.shape == (1,) and 0 <= scores[0] <= 1
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"PATH": "/nonexistent"})


@pytest.mark.parametrize("name", spark_nsfw.__all__)
def test_public_names_exist(name):
    assert getattr(spark_nsfw, name).__doc__


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_all_lists_names_that_exist(path):
    module = module_name(path)
    if module.endswith("__main__"):
        return
    __import__(module)
    for name in getattr(sys.modules[module], "__all__", []):
        assert hasattr(sys.modules[module], name)
