"""The rooms of the design: who may import what."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import spark_nsfw

PACKAGE = Path(spark_nsfw.__file__).parent
CORE = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.glob("*.py")
    if path.stem not in ("__init__", "dataset", "cli")
)


def imported_by(path):
    """Modules that a file imports, but for those that only its types need."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


def importers_of(*modules):
    return {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[: len(m.split("."))] == m.split(".")
               for name in imported_by(path) for m in modules)
    }  # fmt: skip


def test_only_the_shell_imports_pyspark():
    shell = {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.glob("spark/*.py")}
    assert importers_of("pyspark", "spark_nsfw.spark") <= shell | {
        "dataset.py",
        "__init__.py",
    } | {p.relative_to(PACKAGE).as_posix() for p in PACKAGE.glob("cli/*.py")}


def test_only_pixels_decodes_images():
    assert importers_of("PIL") == {"score/pixels.py"}


def test_only_the_report_draws():
    assert importers_of("matplotlib", "jinja2") == {"use/charts.py", "use/page.py"}


def test_only_the_scorer_puts_models_together():
    both = importers_of("spark_nsfw.score.embedder") & importers_of("spark_nsfw.score.classifier")
    core = {path for path in both if "/" not in path}
    assert core == {"dataset.py", "provenance.py", "scorer.py"}


def test_reading_shards_needs_no_torch():
    script = (
        "import sys\n"
        "import spark_nsfw.spark.reader\n"
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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.name)
def test_all_lists_names_that_exist(path):
    module = ".".join(["spark_nsfw", *path.relative_to(PACKAGE).with_suffix("").parts])
    module = module.removesuffix(".__init__")
    __import__(module)
    for name in getattr(sys.modules[module], "__all__", []):
        assert hasattr(sys.modules[module], name)
