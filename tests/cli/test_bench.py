"""`hf-tam bench`: its ratios follow from the times that it recorded, its bytes from a count by hand."""

import json
import multiprocessing
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch

from hf_tam import AdaTAMW, cli
from hf_tam.cli import bench as command
from hf_tam.lab.bench import measuring, processes
from hf_tam.lab.bench.contenders import CONTENDERS, is_installed, layerwise
from hf_tam.lab.bench.statistics import pair_ratio
from hf_tam.lab.bench.workloads import NAMES, find_workload

ROW = {
    "optimizer", "baseline", "seconds", "baseline_seconds", "ratio", "state_bytes", "baseline_state_bytes",
    "extra_bytes_per_tensor", "largest_temporary_bytes", "peak_temporary_bytes", "baseline_largest_temporary_bytes",
    "baseline_peak_temporary_bytes", "moved_bytes", "share_of_copy",
}  # fmt: skip
RUN = {
    "workload", "tensors", "elements", "dtype", "device", "threads", "processes", "rounds", "clip", "fresh", "rows",
    "left_out", "copy_bytes_per_second", "load_average_before", "load_average_after",
}  # fmt: skip
TINY = ["bench", "--workload", "tiny", "--device", "cpu", "--threads", "1", "--rounds", "4"]
NUM_TENSORS, NUM_ELEMENTS = 5, 8 * 4 + 4 * 16 + 7 + 1


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch):
    monkeypatch.setattr(measuring, "_COPY_BYTES", 1 << 16)


def run(tmp_path, *words):
    file = tmp_path / "bench.json"
    assert cli.main([*TINY, *words, "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.mark.parametrize(
    ("name", "num_tensors", "num_elements"),
    [
        ("lora-7b", 448, 39_976_960),  # peft's count for r=16 on all linear layers of Llama-2-7B
        ("full-1b", 146, 1_235_814_400),  # that of Llama-3.2-1B
        ("full-100m", 1 + 9 * 12 + 1, 109_529_856),
        ("many-3000", 3000, 3000 * 16 * 1024),
    ],
)
def test_the_workloads_are_the_models(name, num_tensors, num_elements):
    workload = find_workload(name)
    assert (len(workload.shapes), workload.num_elements) == (num_tensors, num_elements)


def test_lora_has_an_a_and_a_b_for_each_layer():
    shapes = find_workload("lora-7b").shapes
    assert all(first[0] == second[1] == 16 for first, second in zip(shapes[::2], shapes[1::2], strict=True))
    assert shapes[12:14] == ((16, 11008), (4096, 16))  # down_proj


def test_the_file_holds_everything(tmp_path, capsys):
    report = run(tmp_path, "--dtype", "float32", "bfloat16")
    assert report.keys() == {"command", "machine", "runs"}
    assert {"cpu", "cores", "gpu", "python", "versions", "load_average"} <= report["machine"].keys()
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert [found["dtype"] for found in report["runs"]] == ["float32", "bfloat16"]
    names = [name for name in CONTENDERS if name not in ("adamw", "sgd") and not name.startswith("bits")]
    for found in report["runs"]:
        assert found.keys() == RUN
        assert (found["tensors"], found["elements"]) == (NUM_TENSORS, NUM_ELEMENTS)
        assert found["left_out"] == {}
        assert [row["optimizer"] for row in found["rows"]] == [
            name for name in names if is_installed(CONTENDERS[name])
        ]
        for row in found["rows"]:
            assert row.keys() == ROW
            assert len(row["seconds"]) == len(row["baseline_seconds"]) == 4
            assert min(row["seconds"] + row["baseline_seconds"]) > 0.0
            assert row["baseline"] == ("sgd" if row["optimizer"] == "tam" else "adamw")
    printed = capsys.readouterr().out
    for row in report["runs"][0]["rows"]:
        assert f"{row['ratio']['median']:.2f}  " in printed
        assert row["optimizer"] in printed


def test_the_command_of_the_file_does_the_same_again(tmp_path):
    report = run(tmp_path, "--optimizers", "adatamw", "--clip")
    words = report["command"].split()
    assert words[0] == "hf-tam"
    (tmp_path / "bench.json").unlink()
    assert cli.main(words[1:]) == 0
    again = json.loads((tmp_path / "bench.json").read_text())
    assert again["command"] == report["command"]
    assert again["runs"][0]["clip"] is True


def test_ratios_and_bandwidth_follow_from_the_times(tmp_path):
    (found,) = run(tmp_path, "--optimizers", "adatamw", "tam", "adamw-foreach")["runs"]
    for row, accesses in zip(found["rows"], (9, 7, 7), strict=True):
        ratios = [mine / theirs for mine, theirs in zip(row["seconds"], row["baseline_seconds"], strict=True)]
        assert row["ratio"]["median"] == pytest.approx(median(ratios))
        assert (row["ratio"]["low"], row["ratio"]["high"]) == pytest.approx((min(ratios), max(ratios)))
        assert row["moved_bytes"] == accesses * NUM_ELEMENTS * 4
        rate = row["moved_bytes"] / median(row["seconds"])
        assert row["share_of_copy"] == pytest.approx(rate / found["copy_bytes_per_second"])


def test_clipping_moves_more_for_those_who_clip_before(tmp_path):
    (found,) = run(tmp_path, "--optimizers", "adatamw", "adamw-foreach", "--clip")["runs"]
    assert [row["moved_bytes"] // NUM_ELEMENTS // 4 for row in found["rows"]] == [9, 10]


def test_who_clips_and_where(monkeypatch):
    """Ours inside the step, the others by torch's function, which is part of what is timed."""
    calls = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda params, norm: calls.append(norm) or clip(params, norm)
    )
    stand = make_stand([(3, 2)])
    for name, expected in (("adamw", 1), ("adatamw", 0)):
        runner = measuring._Runner.warm_up(stand, CONTENDERS[name], clip=True, grouped=False)
        calls.clear()
        runner.time(stand)
        assert len(calls) == expected
    assert runner.optimizer.param_groups[0]["max_grad_norm"] == 1.0


def test_the_baseline_is_who_was_named(tmp_path):
    (found,) = run(tmp_path, "--optimizers", "adamw", "adatamw-foreach", "--against", "adatamw")["runs"]
    assert {row["baseline"] for row in found["rows"]} == {"adatamw"}


def test_the_state_is_counted(tmp_path):
    """AdamW: two moments and a step count of 4 bytes a tensor. Ours: the count, a scale and the torque."""
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        (found,) = run(tmp_path, "--optimizers", "adatamw", "adatamw-single", "tam", "--dtype", dtype)["runs"]
        fused, single, tam = found["rows"]
        for row in (fused, single):
            assert row["baseline_state_bytes"] == 2 * itemsize * NUM_ELEMENTS + 4 * NUM_TENSORS
            assert row["state_bytes"] == 2 * itemsize * NUM_ELEMENTS + 12 * NUM_TENSORS
            assert row["extra_bytes_per_tensor"] == 8
        assert tam["baseline_state_bytes"] == itemsize * NUM_ELEMENTS
        assert tam["state_bytes"] == itemsize * NUM_ELEMENTS + 8 * NUM_TENSORS


def test_a_shared_storage_counts_once_and_a_view_counts_whole():
    param = torch.nn.Parameter(torch.zeros(4))
    optimizer = AdaTAMW([param])
    packed = torch.zeros(100)
    optimizer.state[param] = {"a": packed[:1], "b": packed[1:], "more": [{"c": torch.zeros(3, dtype=torch.int64)}]}
    assert measuring.state_bytes(optimizer) == 400 + 24


def make_stand(shapes):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    return measuring.Stand(params, torch.device("cpu"))


def test_temporaries_are_seen():
    def step():
        large = torch.empty(1000, dtype=torch.float64)
        small = torch.empty(10, dtype=torch.float64)
        del large, small
        torch.empty(500, dtype=torch.float64)

    found = measuring._temporaries(step, torch.device("cpu"))
    assert found == {"largest_temporary": 8000, "peak_temporary": 8080}


def test_the_fused_backend_needs_no_temporary_of_a_tensors_size():
    stand = make_stand([(300, 400), (70,)])
    fused = measuring._Runner.warm_up(stand, CONTENDERS["adatamw"], clip=True, grouped=False).temporaries
    assert fused["largest_temporary"] < 300 * 400 * 4 / 10
    single = measuring._Runner.warm_up(stand, CONTENDERS["adatamw-single"], clip=True, grouped=False).temporaries
    assert single["largest_temporary"] >= 300 * 400 * 4


def test_every_step_has_new_gradients():
    stand = make_stand([(5, 3), (2,), ()])
    stand.fill()
    before = [param.grad.clone() for param in stand.params]
    stand.fill()
    for old, param in zip(before, stand.params, strict=True):
        assert not torch.equal(old, param.grad)


@pytest.mark.parametrize(
    ("count", "ranks", "coverage"),
    # the tables of the sign test: with 25 pairs the 8th and the 18th value hold the median 95.7% of the time
    [(1, (1, 1), 0.0), (2, (1, 2), 0.5), (5, (1, 5), 0.9375), (6, (1, 6), 0.96875), (10, (2, 9), 0.9785),
     (25, (8, 18), 0.9567)],
)  # fmt: skip
def test_the_interval_lies_between_order_statistics(count, ranks, coverage):
    seconds = torch.randperm(count).add(1.0).tolist()
    ratio = pair_ratio([2.0 * value for value in seconds], [2.0] * count)
    assert (ratio.low, ratio.high) == ranks
    assert ratio.coverage == pytest.approx(coverage, abs=1e-4)
    assert ratio.median == median(seconds)


def test_thousands_of_pairs_have_an_interval():
    """As the normal approximation has it: 1.96 * sqrt(n) / 2 ranks on either side of the middle."""
    seconds = [1.0 + index for index in range(3001)]
    ratio = pair_ratio(seconds, [1.0] * 3001)
    assert ratio.median == 1501.0
    assert abs(ratio.low - (1501 - 0.98 * 3001**0.5)) <= 1.5
    assert abs(ratio.high - (1501 + 0.98 * 3001**0.5)) <= 1.5
    assert 0.95 <= ratio.coverage < 0.953


def test_ratios_are_taken_pair_by_pair():
    # a machine that becomes slower and slower: the ratio of the medians would be the same by luck only
    assert pair_ratio([2.0, 4.0, 8.0], [1.0, 4.0, 16.0]).median == 1.0
    with pytest.raises(ValueError, match="no pair was timed"):
        pair_ratio([], [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workload", "lora-8b"], "no workload 'lora-8b': there are lora-7b, full-100m, full-1b, many-N"),
        (["--workload", "many-0"], "no workload 'many-0'"),
        (["--optimizers", "adamwt"], "no optimizer 'adamwt': there are adamw, adamw-foreach"),
        (["--against", "adamwt"], "no optimizer 'adamwt'"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--threads", "-1"], "--threads -1: must be at least 1"),
        (["--processes", "0"], "--processes 0: must be at least 1"),
        (["--device", "abacus"], "--device abacus: torch"),
        (["--workload", "many-999999"], "GiB of memory for these optimizers, and 1.0 GiB are free: name fewer"),
        (["--json", "no/such/folder/bench.json"], "no/such/folder is not a folder that can be written to"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, monkeypatch, capsys):
    monkeypatch.setattr("hf_tam.lab.bench.machine.available_memory", lambda device: 1 << 30)
    assert cli.main([*TINY, *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("hf-tam bench: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_a_package_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main([*TINY, "--optimizers", "bitsandbytes.AdamW8bit"]) == 2
    assert "bitsandbytes.AdamW8bit needs bitsandbytes: pip install bitsandbytes" in capsys.readouterr().err


def test_who_cannot_run_is_left_out_with_the_reason(tmp_path, monkeypatch, capsys):
    def refuse(params, **options):
        raise RuntimeError("no kernel for this device\nand more")

    monkeypatch.setitem(measuring.CONTENDERS, "adatamw-fused", measuring.Contender(refuse, "broken"))
    (found,) = run(tmp_path, "--optimizers", "adatamw-fused", "adatamw")["runs"]
    assert found["left_out"] == {"adatamw-fused": "no kernel for this device"}
    assert [row["optimizer"] for row in found["rows"]] == ["adatamw"]
    assert "adatamw-fused: left out: no kernel for this device" in capsys.readouterr().out


def test_the_help_names_what_there_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    printed = capsys.readouterr().out
    assert command._OPTIMIZERS == tuple(CONTENDERS)
    assert command._WORKLOADS == NAMES
    assert all(name in printed for name in (*CONTENDERS, *NAMES))


@pytest.mark.distributed
def test_sharded_by_fsdp2(tmp_path):
    words = ["--processes", "2", "--optimizers", "adatamw", "--rounds", "2", "--clip"]
    (found,) = run(tmp_path, *words)["runs"]
    assert found["processes"] == 2
    assert found["left_out"] == {}
    (row,) = found["rows"]
    assert len(row["seconds"]) == len(row["baseline_seconds"]) == 2
    # of the first process: rows 0 to 3, 0 to 1 and 0 to 3 of three tensors, and the one element of the fourth
    part = 4 * 4 + 2 * 16 + 4 + 1
    assert row["baseline_state_bytes"] == 2 * 4 * part + 4 * NUM_TENSORS
    assert row["extra_bytes_per_tensor"] == 8
    assert multiprocessing.active_children() == []


def fail_on_the_second_rank(rank, folder, *args):
    if rank == 1:
        Path(folder, "error-1").write_text("the memory of process 1 is full")
        sys.exit(1)
    time.sleep(600)


@pytest.mark.distributed
def test_a_process_that_fails_ends_all(monkeypatch, capsys):
    monkeypatch.setattr(processes, "_serve", fail_on_the_second_rank)
    started = time.monotonic()
    assert cli.main([*TINY, "--processes", "2", "--optimizers", "adatamw"]) == 1
    assert time.monotonic() - started < 120
    assert "tiny: process 1 failed: the memory of process 1 is full" in capsys.readouterr().err
    assert multiprocessing.active_children() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_time_of_the_device_is_told_apart(tmp_path, monkeypatch):
    """Many small tensors: nearly all of a step's time is the host's."""
    monkeypatch.setattr(measuring, "_COPY_BYTES", 1 << 28)
    (found,) = run(tmp_path, "--workload", "many-500", "--optimizers", "adatamw", "--device", "cuda")["runs"]
    (row,) = found["rows"]
    assert len(row["device_seconds"]) == len(row["seconds"])
    assert 0.0 < max(row["device_seconds"]) < min(row["seconds"])


def test_a_param_group_for_each_tensor():
    """Each contender gets them, with learning rates that differ."""
    workload = find_workload("many-groups-5")
    assert find_workload("many-groups").shapes == ((64, 64),) * 465
    assert workload.grouped
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(5)]
    for name in ("adamw", "adatamw", "sgd", "tam"):
        groups = CONTENDERS[name].make(layerwise(params)).param_groups
        assert len({group["lr"] for group in groups}) == 5


@pytest.mark.launch
def test_fresh_processes_are_measured_one_after_the_other(tmp_path, capsys):
    """The row is that of the process in the middle, and all their ratios stand beside it."""
    (found,) = run(tmp_path, "--processes-fresh", "3", "--optimizers", "adatamw")["runs"]
    (row,) = found["rows"]
    assert found["fresh"] == 3
    assert len(row["process_ratios"]) == 3
    assert row["process_ratios"] == sorted(row["process_ratios"])
    assert row["ratio"]["median"] == row["process_ratios"][1]
    out = capsys.readouterr().out
    assert "3 fresh processes" in out
    assert "over processes" in out
