"""README, docs/ and CHANGELOG: commands are where .ci/run looks for them, numbers are those of recipes/results/."""

import dataclasses
import functools
import inspect
import io
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

import hf_tam

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "recipes/README.md", *DOCS]
MAIN_JOB = ".venv/bin/python recipes/sft.py"
TESTS = ".venv/bin/python -m pytest -n 2 --dist loadgroup"
INSTALL = 'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[{}]" && '
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(text, language):
    """The code in this language."""
    return [code for found, code in FENCED.findall(text) if found == language]


def prose(text):
    """What is no code."""
    return FENCED.sub("", text)


def named(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def test_the_readme_is_one_page():
    assert len(prose(README).split()) <= 900


def test_the_first_block_runs_the_main_job_and_the_second_the_tests():
    run, test = [code for _, code in FENCED.findall(README)][:2]
    assert run == INSTALL.format("recipes") + MAIN_JOB + "\n"
    assert test == INSTALL.format("test") + TESTS + "\n"


def test_the_gate_finds_the_command_of_the_tests():
    program = re.search(r"awk '(.*?)' README.md", (ROOT / ".ci" / "run").read_text())[1]
    found = subprocess.run(["awk", program, ROOT / "README.md"], capture_output=True, text=True, check=True)
    assert found.stdout == INSTALL.format("test") + TESTS + "\n"


@pytest.mark.parametrize("path", named(DOCS))
def test_a_page_begins_with_a_command_or_a_picture(path):
    assert re.match(r"# .+\n\n(```(bash|diff|python|mermaid)\n|!\[)", path.read_text())


def anchors(path):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_links_lead_somewhere(path):
    text = re.sub(r"`[^`\n]+`", "", prose(path.read_text()))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        target = (path.parent / place).resolve() if place else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_files_that_are_named_are_there(path):
    names = re.findall(r"`((?:docs|hf_tam|recipes|tests)/[\w./-]+)`", prose(path.read_text()))
    assert not [name for name in names if not (ROOT / name).exists()]


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_python_compiles(path):
    for code in blocks(path.read_text(), "python"):
        compile(code, str(path), "exec")


def test_the_optimizer_example_runs(capsys):
    (example,) = blocks(README, "python")
    exec(example, {})
    assert capsys.readouterr().out == "tensor([0.5000, 0.5000])\n"


@pytest.mark.parametrize("page", ["README.md", "docs/arguments.md"])
def test_the_arguments_have_these_defaults(page):
    from hf_tam.integrations.transformers.optim_args import KEYS

    text = (ROOT / page).read_text().partition("argument")[2]
    found = dict(re.findall(r"^(?:\*|\|) `(\w+)` (?:\(|\| )`?([\w.-]+)`?(?: \||\))", text, flags=re.MULTILINE))
    parameters = inspect.signature(hf_tam.AdaTAMW).parameters
    kept = ["param_correction", "state_bits"]
    ours = ["gamma", "damping_eps", "scope", "step_size", "torque_steps", "nonfinite", "max_grad_norm", *kept]
    assert list(found) == ours
    assert {name: str(parameters[name].default).lower() for name in ours} == {
        name: str(float(value)) if value[0].isdigit() else value for name, value in found.items()
    }
    assert set(ours) - set(KEYS["adatamw"]) == {"max_grad_norm"}


def before_and_after():
    """The diffs of the README, each as the script before it and after it."""
    for diff in blocks(README, "diff"):
        lines = diff.splitlines()
        assert len(lines) == 3
        yield tuple("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))


@pytest.mark.long
def test_the_lines_before_and_after_run():
    """The Trainer's, trl's and a loop's; after them it is ours that is asked for."""
    transformers, trl = pytest.importorskip("transformers"), pytest.importorskip("trl")
    known = {"torch": torch, "model": torch.nn.Linear(2, 1), "TrainingArguments": transformers.TrainingArguments}
    known["SFTConfig"] = functools.partial(trl.SFTConfig, bf16=False)  # its default asks for a GPU
    found = []
    for before, after in before_and_after():
        old, new = dict(known), dict(known)
        exec(before, old)
        exec(after, new)
        found.append([space.get("args", space.get("optimizer")) for space in (old, new)])
    assert [(old.optim, new.optim) for old, new in found[:2]] == [("adamw_torch", "adatamw")] * 2
    assert [type(optimizer) for optimizer in found[2]] == [torch.optim.AdamW, hf_tam.AdaTAMW]


def versions():
    """Version and date of the entries of CHANGELOG.md, the newest first."""
    return re.findall(r"^## \[(\d[^\]]*)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_version_is_the_newest_of_the_changelog():
    assert versions()[0][0] == hf_tam.__version__
    dates = [date for _, date in versions()]
    assert dates == sorted(dates, reverse=True)


def test_the_changelog_says_what_kind_a_change_is():
    lines = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines()[4:] if line]
    kinds = ("### Added", "### Changed", "### Deprecated", "### Removed", "### Fixed", "### Security")
    assert not [line for line in lines if not line.startswith(("- ", "## [")) and line not in kinds]


def test_the_citation_is_of_this_version():
    citation = pytest.importorskip("yaml").safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == versions()[0]
    names = [author["family-names"] for author in citation["preferred-citation"]["authors"]]
    (bibtex,) = blocks(README, "bibtex")
    cited = re.search(r"author\s+= \{(.*?)\}", bibtex, flags=re.DOTALL)[1]
    assert [name.split(",")[0] for name in re.split(r"\s+and\s+", cited)] == names


@pytest.mark.long
def test_the_picture_is_that_of_the_recorded_run():
    """Drawn again; letters may be drawn a little otherwise by another matplotlib."""
    image = pytest.importorskip("matplotlib.image")
    from hf_tam.lab.report.figures import draw_all
    from hf_tam.lab.report.grouping import group_runs
    from hf_tam.lab.report.reading import read_runs

    (run,) = read_runs([ROOT / "recipes/results/sft-demo"])
    (picture,) = draw_all(group_runs([dataclasses.replace(run, metrics=[])], by=None))
    drawn = image.imread(io.BytesIO(picture.png["light"]))
    kept = image.imread(ROOT / "docs/damping-by-layer.png")
    assert drawn.shape == kept.shape
    assert abs(drawn - kept).mean() < 0.01


@pytest.mark.parametrize("path", named(DOCS))
def test_generated_parts_of_pages_are_what_generates_them(path):
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results import pages

    assert pages.render(path.read_text()) == path.read_text(), "run python -m recipes.results.pages"


def test_every_generated_part_stands_on_a_page():
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results import pages

    found = [name for path in DOCS for name in re.findall(r"<!-- begin: (.+?) -->", path.read_text())]
    assert sorted(found) == sorted(pages.PARTS)


def test_a_generated_part_that_was_changed_by_hand_is_written_anew():
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results import pages, speed

    text = "a <!-- begin: growth -->\n\nby hand\n\n<!-- end --> b"
    assert pages.render(text) == f"a <!-- begin: growth -->\n\n{speed.growth()}\n\n<!-- end --> b"
    with pytest.raises(KeyError):
        pages.render("<!-- begin: nothing --><!-- end -->")


@pytest.mark.long
def test_the_page_of_comparisons_is_generated():
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results.evidence import FOLDER, overview, page

    assert re.search(r"\d+ better, \d+ ties, \d+ worse", overview())[0] in README
    assert page() == (FOLDER / "comparisons.md").read_text()
    assert "(at an end of the grid)" not in page()


def test_the_readmes_figures_of_speed_are_the_largest_of_the_tables():
    from recipes.results import speed

    steps = [line for line in speed.table().splitlines() if ": step / " in line]
    medians = [float(ratio) for line in steps for ratio in re.findall(r"\| (\d\.\d\d) \(", line)]
    grown = [float(ratio) for ratio in re.findall(r"\| (\d\.\d\d) \(", speed.growth())]
    assert f"at most {max(medians)} times" in README
    assert f"({max(grown):g} with 100 small tensors" in README


def test_the_older_table_follows_its_rows(tmp_path):
    pytest.importorskip("pandas")
    from recipes.results.summary import ROWS, table

    changed = tmp_path / "rows.jsonl"
    changed.write_text(re.sub(r'"test_accuracy": 0\.\d', '"test_accuracy": 0.0', ROWS.read_text()))
    assert table(changed) != table()


def test_the_table_of_speed_follows_the_raw_times(tmp_path):
    from recipes.results import speed

    times = {"seconds": [3.0, 6.0, 2.0], "baseline_seconds": [2.0, 3.0, 2.0], "ratio": {"median": 99.0}}
    row = {"optimizer": "adatamw", "baseline": "adamw", **times}
    facts = {"workload": "lora-7b", "dtype": "bfloat16", "device": "cpu", "processes": 1, "clip": False}
    run = {**facts, "load_average_after": [7.0, 1.0, 1.0], "rows": [row]}
    (tmp_path / "bench-made-up.json").write_text(json.dumps({"runs": [run]}))
    first, *others = speed.table(tmp_path).splitlines()[2:]
    assert "| <= 1.6 | not measured yet | 1.50 (1.00 to 2.00, 3 pairs) | 7.0 |" in first
    assert all("not measured yet" in line for line in others)
    assert sum("no GPU at hand" in line for line in others) == 8
    assert speed.table(tmp_path) not in (ROOT / "docs/speed.md").read_text()


@pytest.mark.long
def test_the_tables_of_comparisons_follow_their_rows(tmp_path):
    """Other test results give other tables, and the same choice of learning rates."""
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results import evidence

    assert evidence.sections(tmp_path).count("not measured yet") == len(list(evidence.PLANS.glob("*.yaml")))
    for path in evidence.FOLDER.glob("compare-*.jsonl"):
        changed = re.sub(r'("test_(?:\w*accuracy|loss)": \d*\.)\d', r"\g<1>1", path.read_text())
        (tmp_path / path.name).write_text(changed)
        plan = evidence.PLANS / f"{path.stem.removeprefix('compare-')}.yaml"
        before, after = evidence.section(plan), evidence.section(plan, tmp_path)
        if "under way" in before:
            assert before == after
            continue
        assert before != after
        best = [re.findall(r"^\| [^|]+ \| ([\d.e-]+)", text, flags=re.MULTILINE)[:2] for text in (before, after)]
        assert best[0] == best[1]
    assert evidence.overview(tmp_path) not in (ROOT / "docs/measured.md").read_text()


def test_a_comparison_that_is_under_way_has_no_result(tmp_path):
    pytest.importorskip("scipy")
    pytest.importorskip("pandas")
    from recipes.results import evidence

    name = "banking77-minilm-full"
    lines = (evidence.FOLDER / f"compare-{name}.jsonl").read_text().splitlines(keepends=True)
    for some in (lines[:1], lines[:-1]):
        (tmp_path / f"compare-{name}.jsonl").write_text("".join(some))
        assert evidence.section(evidence.PLANS / f"{name}.yaml", tmp_path).endswith(
            f"under way, [rows so far](compare-{name}.jsonl)."
        )
        assert name in evidence.overview(tmp_path).rpartition("Not measured yet:")[2]
    (tmp_path / f"compare-{name}.jsonl").write_text("".join(lines))
    assert "| AdaTAMW |" in evidence.section(evidence.PLANS / f"{name}.yaml", tmp_path)


def test_the_trainers_figure_follows_the_rates(tmp_path):
    from recipes.results import speed

    assert speed.inside_the_trainer(tmp_path).count("not measured yet") == 2
    rates = {"adatamw": [1.0, 3.0, 2.0], "adamw_torch_fused": [1.0, 2.0, 4.0]}
    facts = {"model": "m", "tensors": 3, "elements": 7, "tokens_per_second": rates, "ratio": {"median": 99.0}}
    (tmp_path / "bench-trainer.json").write_text(json.dumps(facts))
    assert "1.000 (0.500 to 1.500, 3 pairs of steps)" in speed.inside_the_trainer(tmp_path)


def test_the_growth_follows_the_raw_times(tmp_path):
    from recipes.results import speed

    row = {"seconds": [3.0, 6.0, 2.0], "baseline_seconds": [2.0, 3.0, 2.0], "ratio": {"median": 99.0}}
    runs = [{"workload": f"many-{size}", "tensors": size, "processes": 2, "rows": [row]} for size in (3000, 100)]
    assert speed.growth(tmp_path) == ""
    (tmp_path / "bench-made-up.json").write_text(json.dumps({"runs": runs}))
    assert speed.growth(tmp_path).splitlines()[2:] == [
        "| 100 | 2000.0 | 3000.0 | 1.50 (1.00 to 2.00, 3 pairs) |",
        "| 3,000 | 2000.0 | 3000.0 | 1.50 (1.00 to 2.00, 3 pairs) |",
    ]
