"""The planner's commands as a user runs them: forecasts, searches, claims, tables, fits, pages, errors with hints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from headrace.cli import main
from headrace.plan.record import PassGroup, RunRecord, keep_record

PC = "rtx-4090 + 64GB + nvme-gen4"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def answer(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_published_model_on_another_machine_is_forecast_with_intervals_and_sources() -> None:
    found = answer("plan", "llama-3-8b", "--machine", PC, "--bits", "4.85")
    for phase in ("prefill", "decode"):
        speed = found[phase]["tok_per_s"]
        assert speed["low"] < speed["expected"] < speed["high"]
        assert all(0 <= share <= 1 for share in found[phase]["utilisation"].values())
        assert found[phase]["binding"]
    assert found["usd_per_million_output"]["expected"] > found["usd_per_million_input"]["expected"] > 0
    assert found["joules_per_token"] > 0
    assert any("Llama" in source for source in found["sources"])
    assert found["changes"][0]["gain"] >= found["changes"][-1]["gain"] > 1


def test_the_text_shows_the_same_and_its_assumptions() -> None:
    result = run("plan", "llama-3-70b", "--machine", PC, "--bits", "4.85")
    assert result.exit_code == 0
    assert "80 % of measurements" in result.stdout
    assert "assumed" in result.stdout
    assert "faster with" in result.stdout


def test_a_number_of_parameters_is_a_model() -> None:
    found = answer("plan", "--params", "175e9", "--machine", "8x a100-80gb")
    assert found["memory"]["weights_bytes"] == pytest.approx(350e9)


def test_a_folder_is_read_by_its_config(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "intermediate_size": 14336,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = answer("plan", str(tmp_path), "--machine", PC, "--bits", "4.85")
    assert found["memory"]["weights_bytes"] == pytest.approx(8.03e9 * 4.85 / 8, rel=0.01)


def test_a_file_can_be_forecast_for_another_machine(tiny_llama: Path) -> None:
    assert answer("plan", str(tiny_llama), "--machine", PC, "--prompt-tokens", "8", "--tokens", "8")["machine"] == PC


def test_the_cheapest_configuration_with_a_speed_is_found_with_the_frontier() -> None:
    found = answer("plan", "llama-3-8b", "--machine", "rtx-4090", "--require-tok-s", "100")
    assert 1 / found["s_per_token"]["expected"] >= 100
    costs = [point["usd_per_million_output"] for point in found["frontier"]["cost"]]
    speeds = [point["tok_per_s_each"] for point in found["frontier"]["cost"]]
    assert costs == sorted(costs)
    assert speeds == sorted(speeds)


@pytest.mark.parametrize(
    ("arguments", "said", "hint"),
    [
        (["llama-3-80b", "--machine", PC], "no published model", "llama-3-8b"),
        (["llama-3-8b", "--machine", "rtx-4091"], "no part of a machine", "rtx-4090"),
        (["llama-3-8b", "--machine", "rtx-4090 + 64"], "without a unit", "64GB"),
        (["llama-3-8b", "--machine", PC, "--memory", "4GiB"], "contradict", "--machine"),
        (["llama-3-8b", "--machine", PC, "--draft", "self"], "for this machine", "llama-3.2-1b"),
        (["llama-3-70b", "--machine", "rtx-4090 + 16GB"], "no disk", "nvme"),
        (["llama-3-8b", "--machine", PC, "--require-tok-s", "1e6"], "nothing reaches", "the fastest"),
        (["llama-3-8b", "--machine", PC, "--budget-usd", "0.001"], "nothing costs", "cheapest"),
        (["llama-3-8b", "--params", "8e9", "--machine", PC], "two models", "one of them"),
        (["--params", "8", "--machine", PC], "no language model", "175e9"),
        (["--machine", PC], "no model", "--params"),
        (["{model}", "--prompt-tokens", "100000"], "100000 tokens", "--prompt-tokens"),
        (["{model}", "--usd-per-kwh", "0.3"], "price of this machine", "--machine"),
        (["missing.gguf"], "no file", ".gguf"),
        (["gpt-3", "--machine", "8x a100-80gb", "--tokens", "4000"], "was made for", "2048"),
        (["llama-3-8b", "--machine", "no-such.toml"], "cannot read", "parts"),
        (["--fit", "no-such.jsonl"], "profile", "probe"),
    ],
)
def test_invalid_options_are_an_error_with_a_hint(
    arguments: list[str], said: str, hint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path
) -> None:
    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    result = run("plan", *(str(tiny_llama) if one == "{model}" else one for one in arguments))
    assert result.exit_code in (1, 2)
    assert said in result.stderr
    assert hint in result.stderr.split("hint:")[1]


def test_this_machine_answers_for_a_published_model() -> None:
    assert answer("plan", "smollm2-1.7b", "--bits", "4.85", "--memory", "4GiB")["decode"]["tok_per_s"]["expected"] > 0


def test_a_plan_shows_its_schedule(tiny_llama: Path) -> None:
    result = run("plan", str(tiny_llama), "--memory", "1GiB", "--prompt-tokens", "8", "--tokens", "8")
    assert result.exit_code == 0, result.output
    assert re.search(r"compute +\|.+\| +\d+%", result.stdout)


def test_claims_are_listed_and_run() -> None:
    listed = run("claims")
    assert "holds" in listed.stdout
    one = run("claims", "33")
    assert "changes the verdict" in one.stdout
    assert answer("claims", "03b")["id"] == "3b"
    assert len(answer("claims")) == 57
    assert "hint" in run("claims", "99").stderr


def test_tables_list_names_and_facts() -> None:
    assert "rtx-4090" in run("tables", "devices").stdout
    assert "nvme-gen4" in run("tables", "links").stdout
    assert answer("tables", "models")["gpt-3"]["source"]


def test_pages_need_no_network_and_no_script(tmp_path: Path, tiny_llama: Path) -> None:
    page, gallery, own = tmp_path / "page.html", tmp_path / "claims.html", tmp_path / "own.html"
    assert run("plan", "llama-3-70b", "--machine", PC, "--bits", "4.85", "--html", str(page)).exit_code == 0
    assert run("claims", "--html", str(gallery)).exit_code == 0
    small = ("--memory", "1GiB", "--prompt-tokens", "8", "--tokens", "8")
    assert run("plan", str(tiny_llama), *small, "--html", str(own)).exit_code == 0
    for path in (page, gallery, own):
        text = path.read_text()
        assert not re.search(r"<script|<link|<img|(?:src|href)=\"http|@import|url\(http", text), path
        assert "prefers-color-scheme: dark" in text
        assert "@media print" in text
    assert page.read_text().count("<svg") == 4
    assert "currentColor" in page.read_text()
    assert gallery.read_text().count("<article") == 57


def test_fitting_to_runs_updates_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headrace.plan.profile import guessed_profile, load_profile, save_profile

    monkeypatch.setenv("HEADRACE_HOME", str(tmp_path))
    profile = guessed_profile()
    save_profile(profile)
    records = tmp_path / "runs.jsonl"
    for number in range(4):
        group = PassGroup(
            rows=1,
            count=9,
            seconds=2.0,
            read_bytes=1e9,
            stall_s=0.5,
            draft_s=0.0,
            disk_s=1.0,
            kernel_s=0.01 * (number + 1),
            layer_s=0.01,
        )
        keep_record(
            RunRecord(
                machine=profile.machine,
                model=f"model {number}",
                weights_bytes=10**9,
                pinned_bytes=0,
                streamed_bytes=10**9,
                budget_bytes=10**9,
                layers=2,
                sequences=1,
                draft="none",
                tokens=10,
                ttft_s=1.0,
                predicted_ttft_s=1.0,
                s_per_token=2.0,
                predicted_s_per_token=1.0,
                drafted=0,
                accepted=0,
                passes=(group,),
            ),
            records,
        )
    result = run("plan", "--fit", str(records))
    assert result.exit_code == 0, result.output
    fitted = load_profile()
    assert fitted is not None
    assert fitted.factors["disk"] == pytest.approx(2.0, rel=0.1)
    assert "fitted to 4 runs" in fitted.source
    records.write_text(records.read_text() + "{}\n")
    broken = run("plan", "--fit", str(records))
    assert broken.exit_code == 2
    assert "line 5" in broken.stderr
    assert "hint" in broken.stderr


def test_a_search_keeps_the_given_options() -> None:
    found = answer("plan", "llama-3-8b", "--require-tok-s", "5", "--bits", "16", "--batch", "4", "--draft", "none")
    assert (found["bits"], found["batch"]) == (16, 4)
    result = run("plan", "llama-3-8b", "--require-tok-s", "5", "--memory", "4GiB")
    assert result.exit_code == 2
    assert "--machine" in result.output
