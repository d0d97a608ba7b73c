"""The recipes log the torque unless told not to, and tell how fast they trained and what memory it took."""

import json

import pytest
from datasets import Dataset

from recipes.support.reporting import read_metrics
from recipes.support.speed import throughput


@pytest.mark.long
def test_sft_logs_the_torque(sft):
    status, output, _ = sft("--dataset_name=demo", "--per_device_train_batch_size=2", "--num_sample_generations=0")
    assert status == 0
    rows = read_metrics(sft.output_dir / "torque.jsonl")
    assert {row["step"] for row in rows} == {1, 2, 3}
    assert {row["group"].rpartition(".")[2] for row in rows} == {"lora_A", "lora_B"}
    logged = [row for row in read_metrics(sft.output_dir / "metrics.jsonl") if "loss" in row]
    assert all("torque/lora_B_damping_mean" in row for row in logged)
    results = json.loads((sft.output_dir / "results.json").read_text())
    assert results["tokens_per_second"] > 0
    assert results["peak_process_memory_mib"] > 50
    assert "tokens per second" in output


@pytest.mark.long
@pytest.mark.parametrize("arguments", [["--optim_args=log_torque=false"], ["--optim=adamw_torch"]])
def test_sft_without_it(sft, caplog, arguments):
    assert sft("--dataset_name=demo", "--num_sample_generations=0", "--max_train_samples=8", *arguments)[0] == 0
    assert not (sft.output_dir / "torque.jsonl").exists()
    assert not any("torque/damping_mean" in row for row in read_metrics(sft.output_dir / "metrics.jsonl"))
    assert not [record for record in caplog.records if record.name == "hf_tam"]


def test_throughput_is_of_the_tokens_in_the_records():
    tokens = Dataset.from_dict({"input_ids": [[1, 2, 3], [4]], "labels": [[1, 2, 3], [4]]})
    assert throughput(tokens, 2.5, 5.0) == {"tokens_per_second": 2.0}
    assert throughput(Dataset.from_dict({"pixels": [1, 2, 3, 4]}), 2.0, 4.0) == {"samples_per_second": 2.0}
    assert throughput(iter([]), 1.0, 1.0) == {}
