"""`hf-tam recipes`, from the checkout and from an installed wheel."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hf_tam import cli
from hf_tam.cli import recipe_files

ROOT = Path(__file__).resolve().parents[2]
FILES = recipe_files.list_files(ROOT)
SCRIPTS = [file for file in FILES if file.kind == "script"]


def hf_tam(capsys, *words):
    status = cli.main(["recipes", *map(str, words)])
    return status, *capsys.readouterr()


def test_list_has_every_file_with_its_purpose(capsys):
    status, output, _ = hf_tam(capsys, "list")
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in output.splitlines() if line.startswith("  "))
    assert set(lines) == {file.name for file in FILES}
    for file in FILES:
        size = f"{file.gigabytes} GB  " if file.gigabytes else ""
        assert lines[file.name] == f"{size}{file.purpose}"
        assert len(file.purpose) > 10
    assert lines["sft.py"].startswith("Fine-tune a causal language model")
    assert lines["llama3.2-1b/lora"].endswith(" GB  LoRA fine-tuning of Llama 3.2 1B on your own records")
    assert lines["accelerate/ddp"].startswith("several GPUs")


def test_list_by_words_and_in_the_order_of_sizes(capsys):
    _, output, _ = hf_tam(capsys, "list", "qwen3-")
    names = [line.split()[0] for line in output.splitlines() if line.startswith("  qwen3") and "/lora" in line]
    assert names == [f"qwen3-{size}/lora" for size in ("0.6b", "1.7b", "4b", "8b", "30b-a3b")]
    sizes = [float(size) for size in re.findall(r"^  \S+ +(\S+) GB  ", output, flags=re.MULTILINE)]
    assert sizes == sorted(sizes)
    assert len(sizes) == len(re.findall(r"^  \S+/", output, flags=re.MULTILINE))
    status, _, error = hf_tam(capsys, "list", "no-such")
    assert (status, "no recipe has no-such in its name" in error) == (1, True)


@pytest.mark.launch
def test_reading_the_first_line_alone_is_no_error():
    command = [sys.executable, "-c", "import sys; from hf_tam.cli import main; sys.exit(main(['recipes', 'list']))"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == ("", 0)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("sft.py", "sft.py"),
        ("sft", "sft.py"),
        ("recipes/sft.py", "sft.py"),
        ("llama3.2-1b/lora", "configs/llama3.2-1b/lora.yaml"),
        ("llama3.2-1b/lora.yaml", "configs/llama3.2-1b/lora.yaml"),
        ("recipes/configs/llama3.2-1b/lora.yaml", "configs/llama3.2-1b/lora.yaml"),
        ("trl/grpo", "configs/trl/grpo.yaml"),
        ("ddp", "accelerate/ddp.yaml"),
        ("slurm", "cluster/slurm.sh"),
        ("accelerate/zero3-offload", "accelerate/zero3-offload.json"),
    ],
)
def test_show_prints_a_file_by_any_of_its_names(name, place, capsys):
    assert hf_tam(capsys, "show", name) == (0, (ROOT / "recipes" / place).read_text(), "")


def test_no_two_files_share_a_name():
    names = [name for file in FILES for name in file.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("llama3.2-1b/lor", "llama3.2-1b/lora"),
        ("llama3.2-1b", "llama3.2-1b/full"),
        ("sfd.py", "sft.py"),
        ("zz", "list"),
    ],
)
@pytest.mark.parametrize("action", ["show", "copy"])
def test_unknown_name_is_an_error_with_the_nearest(action, name, near, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output, error = hf_tam(capsys, action, name)
    assert (status, output, error.count("\n")) == (1, "", 1)
    assert f"no recipe is called {name!r}" in error
    assert near in error
    assert not list(tmp_path.iterdir())


def test_copy_of_a_configuration_says_of_what_it_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output, _ = hf_tam(capsys, "copy", "llama3.2-1b/lora")
    assert status == 0
    assert "python recipes/sft.py --config llama3.2-1b-lora.yaml" in output
    assert "python recipes/sft.py --config demo.yaml" in hf_tam(capsys, "copy", "demo/sft-lora", "demo.yaml")[1]
    assert "python recipes/sft.py --config mine.yaml" in hf_tam(capsys, "copy", "llama3.2-1b/lora", "mine.yaml")[1]
    assert "accelerate launch --config_file sub/ddp.yaml" in hf_tam(capsys, "copy", "ddp", "sub")[1]
    assert "hf-tam run -- trl kto --config kto.yaml" in hf_tam(capsys, "copy", "trl/kto", "kto.yaml")[1]
    assert "its header says how" in hf_tam(capsys, "copy", "cluster/sky")[1]
    text = (ROOT / "recipes/configs/llama3.2-1b/lora.yaml").read_text()
    assert Path("llama3.2-1b-lora.yaml").read_text() == Path("mine.yaml").read_text() == text


def test_copy_replaces_nothing_unless_told_to(capsys, tmp_path):
    target = tmp_path / "mine.yaml"
    target.write_text("learning_rate: 1\n")
    status, output, error = hf_tam(capsys, "copy", "gpt2/lora", target)
    assert (status, output) == (1, "")
    assert f"{target} exists and differs: --force" in error
    assert target.read_text() == "learning_rate: 1\n"
    assert hf_tam(capsys, "copy", "gpt2/lora", target, "--force")[0] == 0
    assert target.read_text() == (ROOT / "recipes/configs/gpt2/lora.yaml").read_text()


def test_copy_of_a_script_replaces_nothing_and_joins_what_is_there(capsys, tmp_path):
    assert hf_tam(capsys, "copy", "sft.py", tmp_path)[0] == 0
    assert hf_tam(capsys, "copy", "classify.py", tmp_path)[0] == 0
    changed = tmp_path / "recipes" / "support" / "config.py"
    changed.write_text("# mine\n")
    (tmp_path / "recipes" / "sft.py").unlink()
    status, _, error = hf_tam(capsys, "copy", "sft.py", tmp_path)
    assert status == 1
    assert f"{changed} exists and differs" in error
    assert not (tmp_path / "recipes" / "sft.py").exists()


def test_a_folder_that_cannot_be_written_is_an_error(capsys, tmp_path):
    (tmp_path / "file").touch()
    status, _, error = hf_tam(capsys, "copy", "sft.py", tmp_path / "file")
    assert (status, "is a file: a script needs a folder" in error) == (1, True)
    status, _, error = hf_tam(capsys, "copy", "ddp", tmp_path / "file" / "below")
    assert (status, error.count("\n")) == (1, 1)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.place)
def test_copy_of_a_script_has_all_that_it_imports(script, tmp_path, capsys):
    assert hf_tam(capsys, "copy", script.name, tmp_path)[0] == 0
    copied = {path.relative_to(tmp_path).with_suffix("").as_posix() for path in tmp_path.rglob("*.py")}
    package = set() if recipe_files.stands_alone(script) else {"recipes/__init__"}
    assert {path for path in copied if path.count("/") == 1} == {f"recipes/{script.path.stem}", *package}
    for path in tmp_path.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("recipes"):
                module = node.module.replace(".", "/")
                for name in [module] if module in copied else [f"{module}/{alias.name}" for alias in node.names]:
                    assert name in copied, f"{path} imports {name}"


def test_copy_of_the_loop_is_one_file(tmp_path, capsys):
    status, output, _ = hf_tam(capsys, "copy", "no_trainer", tmp_path)
    assert status == 0
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()} == {
        Path("recipes/no_trainer.py")
    }
    assert "files that it needs" not in output


def test_copy_of_a_script_is_small_and_has_what_it_reads(tmp_path, capsys):
    """Configurations are found by their names in the package that is installed, so none but the demo's is there."""
    assert hf_tam(capsys, "copy", "sft.py", tmp_path)[0] == 0
    places = {path.relative_to(tmp_path / "recipes").as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {place for place in places if place.startswith(("configs/", "accelerate/", "comparisons/"))} == {
        "configs/demo/sft-lora.yaml"
    }
    assert {"data/animals.py", "templates/plain.jinja"} <= places
    assert "data/help_desk.py" not in places
    assert len(places) <= 60


def test_a_script_that_only_names_a_folder_is_copied_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recipe_files, "find_folder", lambda: tmp_path / "installed")
    recipes = tmp_path / "installed" / "recipes"
    (recipes / "metrics").mkdir(parents=True)
    (recipes / "metrics" / "accuracy.py").write_text("")
    (recipes / "alone.py").write_text('"""Alone."""\nprint({"metrics": 1})\n')
    (recipes / "reader.py").write_text(
        '"""Reads."""\nfrom pathlib import Path\nprint(Path(__file__).parent / "metrics")\n'
    )
    for name, count in (("alone.py", 1), ("reader.py", 2)):
        assert hf_tam(capsys, "copy", name, tmp_path / name)[0] == 0
        assert len([path for path in (tmp_path / name).rglob("*") if path.is_file()]) == count


def demos():
    """Every script; those whose demo takes more than seconds are slow."""
    for file in SCRIPTS:
        is_quick = file.place == "classify.py"
        yield pytest.param(file, id=file.place, marks=[] if is_quick else pytest.mark.slow)


@pytest.mark.launch
@pytest.mark.long
@pytest.mark.parametrize("script", list(demos()))
def test_copy_of_a_script_runs_its_demo(script, tmp_path, capsys):
    """For a step, with what was copied alone: the package of the checkout has modules that the copy has not."""
    assert hf_tam(capsys, "copy", script.name, tmp_path)[0] == 0
    words = [tmp_path / "recipes" / script.path.name, "--max_steps", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_validate_before_anything_is_imported(capsys, tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    status, _, error = hf_tam(capsys, "validate", path)
    assert (status, f"{path}: No such file" in error) == (1, True)
    path.write_text("# Launch:    python mine.py\n")
    status, _, error = hf_tam(capsys, "validate", path)
    assert (status, "is no recipe with configurations: --recipe takes classify.py" in error) == (1, True)
    status, _, error = hf_tam(capsys, "validate", path, "--recipe", "no_trainer")
    assert (status, "is for no_trainer.py, which is no recipe with configurations" in error) == (1, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, error = hf_tam(capsys, "validate", path)
    assert (status, "pip install 'hf-tam[recipes]'" in error) == (1, True)


def test_installation_without_recipes_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe_files.hf_tam, "__file__", str(tmp_path / "hf_tam" / "__init__.py"))
    for words in (["list"], ["show", "sft"], ["copy", "sft"]):
        status, _, error = hf_tam(capsys, *words)
        assert (status, "was installed without the recipes" in error) == (1, True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, timeout=120)
    return next(folder.glob("*.whl"))


@pytest.fixture
def installed(wheel, tmp_path):
    """Runs a command in a folder of its own, with the wheel before this checkout."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(command, check=True, timeout=120)
    work = tmp_path / "work"
    work.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*words):
        words = [str(site / "bin" / "hf-tam"), *words[1:]] if words[0] == "hf-tam" else [sys.executable, *words[1:]]
        done = subprocess.run(
            words, cwd=work, env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        return done.returncode, done.stdout, done.stderr

    run.site, run.work = site, work
    return run


@pytest.mark.launch
def test_wheel_has_the_recipes_but_not_their_results(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    inside = {name.removeprefix("hf_tam/_recipes/") for name in names if name.startswith("hf_tam/_recipes/")}
    tracked = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes").rglob("*") if path.is_file()}
    assert inside == {
        name for name in tracked if "__pycache__" not in name and not name.startswith("recipes/results/")
    }
    assert not [name for name in names if name.startswith("recipes/")]


def test_wheel_has_what_is_compiled_at_the_first_step(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    sources = [path for path in (ROOT / "hf_tam").rglob("*") if path.suffix in (".c", ".h")]
    assert len(sources) > 1
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= set(names)


@pytest.mark.launch
def test_installed_wheel_lists_copies_validates_and_runs(installed):
    """As a user does who has no checkout: pip install, copy, run."""
    status, output, error = installed("hf-tam", "recipes", "list")
    assert status == 0, error
    assert {line.split()[0] for line in output.splitlines() if line.startswith("  ")} == {file.name for file in FILES}
    assert installed("hf-tam", "recipes", "show", "ddp")[1] == (ROOT / "recipes/accelerate/ddp.yaml").read_text()

    assert installed("hf-tam", "recipes", "copy", "sft.py")[0] == 0
    assert installed("hf-tam", "recipes", "copy", "smollm2-135m/lora")[0] == 0
    _check_validation(installed)
    for path in installed.work.rglob("*.py"):
        assert path.read_bytes() == (ROOT / path.relative_to(installed.work)).read_bytes()

    program = f"import sys, runpy; sys.argv = ['sft.py', '--help']; {_RUN}"
    status, output, error = installed("python", "-c", program)
    assert status == 0, error
    assert "--lora_target_modules" in output
    modules = output.rpartition("modules: ")[2].split()
    assert modules == [
        str(installed.site / "hf_tam" / "__init__.py"),
        str(installed.work / "recipes" / "support" / "config.py"),
    ]


def _check_validation(installed):
    """One call for all files, because asking the parser means importing torch and transformers."""
    (installed.work / "bad.yaml").write_text("# Launch:    python recipes/sft.py\nlearning_rat: 1e-4\n")
    (installed.work / "other.yaml").write_text("load_in_4bit: maybe\n")
    status, output, error = installed(
        "hf-tam", "recipes", "validate", "bad.yaml", "smollm2-135m-lora.yaml", "other.yaml"
    )
    assert status == 1
    assert output == "smollm2-135m-lora.yaml: valid for sft.py\n"
    # bitsandbytes has a line of its own on some CPUs
    wrong_key, wrong_value = (line for line in error.splitlines() if ".yaml: " in line)
    assert wrong_key == "bad.yaml: unknown key 'learning_rat'; did you mean learning_rate?"
    assert wrong_value.startswith("other.yaml: ")
    assert "maybe" in wrong_value


# Where the modules came from is printed after the help, which ends the script.
_RUN = (
    "import atexit; atexit.register(lambda: print('modules:', sys.modules['hf_tam'].__file__,"
    " sys.modules['recipes.support.config'].__file__)); runpy.run_path('recipes/sft.py', run_name='__main__')"
)
