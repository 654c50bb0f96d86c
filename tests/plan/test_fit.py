"""Learning from runs: known factors are recovered, and invalid records are named."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from headrace.errors import UsageError
from headrace.plan import guessed_profile
from headrace.plan.fit import FACTORS, apply_fit, fit_runs, pass_seconds, quantile
from headrace.plan.record import PassGroup, RunRecord, keep_record, read_records, records_path

HERE = "a processor, 2 cores, 8 GiB"
TRUE = {"disk": 1.2, "kernel": 0.8, "layer": 1.5, "io_cpu": 0.5}  # all different from the start of the search


def record(passes: tuple[PassGroup, ...], model: str = "tiny", **other: object) -> RunRecord:
    plain = RunRecord(
        machine=HERE,
        model=model,
        weights_bytes=10**9,
        pinned_bytes=10**8,
        streamed_bytes=9 * 10**8,
        budget_bytes=10**9,
        layers=32,
        sequences=1,
        draft="none",
        tokens=64,
        ttft_s=1.0,
        predicted_ttft_s=1.1,
        s_per_token=0.5,
        predicted_s_per_token=0.4,
        drafted=0,
        accepted=0,
        passes=passes,
    )
    return replace(plain, **other)  # type: ignore[arg-type]


def group(disk_s: float, kernel_s: float, layer_s: float, rows: int = 1, seconds: float = 1.0) -> PassGroup:
    return PassGroup(
        rows=rows,
        count=20,
        seconds=seconds,
        read_bytes=1e8,
        stall_s=0.0,
        draft_s=0.0,
        disk_s=disk_s,
        kernel_s=kernel_s,
        layer_s=layer_s,
    )


def made(factors: Mapping[str, float], model: str = "tiny", scale: float = 1.0) -> RunRecord:
    """A run whose passes match these factors exactly: bound by disk, by kernels, by layers, and by several."""
    times = (0.05, 0.3, 1.0)
    sizes = [(disk, kernel, layer) for disk in times for kernel in times for layer in (0.02, 0.4)]
    groups = [
        group(scale * disk, scale * kernel, scale * layer, rows) for rows, (disk, kernel, layer) in enumerate(sizes, 1)
    ]
    own = record(tuple(groups), model)
    return replace(own, passes=tuple(replace(one, seconds=pass_seconds(own, one, factors)) for one in groups))


RECORDS = [made(TRUE, "small", 0.1), made(TRUE, "large")]


# Fitting


def test_the_factors_that_made_the_runs_are_recovered() -> None:
    fit = fit_runs(RECORDS, HERE)

    assert dict(fit.factors) == pytest.approx(TRUE, rel=0.05)
    assert fit.median_error < 0.02
    assert fit.spread[0] <= 1.02
    assert fit.spread[1] >= 0.98
    assert (fit.runs, fit.groups) == (2, 36)


def test_a_model_that_ran_often_weighs_no_more_than_one_that_ran_once() -> None:
    slow = {**TRUE, "disk": 2.4}
    once = fit_runs([made(TRUE, "one"), made(slow, "other")], HERE)
    often = fit_runs([made(TRUE, "one")] * 5 + [made(slow, "other")], HERE)
    assert often.factors["disk"] == pytest.approx(once.factors["disk"], rel=0.02)


def test_one_disturbed_run_does_not_dominate() -> None:
    own = made(TRUE)
    disturbed = replace(own, passes=(replace(own.passes[0], seconds=50 * own.passes[0].seconds), *own.passes[1:]))
    assert dict(fit_runs([disturbed], HERE).factors) == pytest.approx(TRUE, rel=0.1)


def test_runs_that_were_predicted_with_the_rates_of_another_probe_do_not_count() -> None:
    now = [replace(one, probed_at="2026-11-28T10:00:00") for one in RECORDS]
    before = replace(made({**TRUE, "disk": 3.0}, "small"), probed_at="2026-11-27T10:00:00")
    fit = fit_runs([*now, before], HERE, "2026-11-28T10:00:00")
    assert dict(fit.factors) == pytest.approx(TRUE, rel=0.05)
    assert fit.runs == 2
    with pytest.raises(UsageError) as caught:
        fit_runs(now, HERE, "2026-11-29T10:00:00")
    assert "last probe" in str(caught.value.hint)


def test_a_factor_that_no_run_constrains_stays() -> None:
    no_disk = [record(tuple(group(0.0, 1.0, 0.1 * number, seconds=0.8 + 0.15 * number) for number in range(1, 5)))]
    fit = fit_runs(no_disk, HERE)
    assert fit.factors["disk"] == pytest.approx(FACTORS["disk"], rel=0.02)
    assert fit.factors["io_cpu"] == pytest.approx(FACTORS["io_cpu"], rel=0.02)


def test_runs_predicted_by_an_earlier_fit_give_the_same_factors() -> None:
    earlier = {"disk": 1.1, "kernel": 0.9, "layer": 1.3, "io_cpu": 0.25}
    later = [
        replace(
            own,
            factors=earlier,
            passes=tuple(
                replace(
                    one,
                    disk_s=one.disk_s * earlier["disk"],
                    kernel_s=one.kernel_s * earlier["kernel"],
                    layer_s=one.layer_s * earlier["layer"],
                )
                for one in own.passes
            ),
        )
        for own in RECORDS
    ]
    assert dict(fit_runs(later, HERE).factors) == pytest.approx(dict(fit_runs(RECORDS, HERE).factors), rel=1e-6)


def test_too_few_runs_are_an_error() -> None:
    with pytest.raises(UsageError, match="2 groups of passes") as caught:
        fit_runs([record((group(1, 1, 1), group(1, 1, 1)))], HERE)
    assert "run a few prompts" in str(caught.value.hint)


def test_runs_of_another_machine_do_not_count_and_are_named() -> None:
    with pytest.raises(UsageError, match="0 groups of passes") as caught:
        fit_runs(RECORDS, "another machine")
    assert "2 records are of another machine" in str(caught.value.hint)


def test_runs_of_another_machine_change_nothing() -> None:
    other = replace(made({**TRUE, "disk": 9.0}), machine="another machine")
    assert fit_runs([*RECORDS, other], HERE) == fit_runs(RECORDS, HERE)


def test_no_runs_are_too_few() -> None:
    with pytest.raises(UsageError):
        fit_runs([], HERE)


# Applying


PROFILE = replace(guessed_profile(), source="measured 2025-01-01", disk_bytes_per_s={"1": 2e9})


def test_a_fit_scales_the_rates_to_the_runs() -> None:
    fit = replace(fit_runs(RECORDS, HERE), factors=TRUE)
    fitted = apply_fit(PROFILE, fit)

    assert fitted.disk_bytes_per_s["1"] == pytest.approx(2e9 / 1.2)
    assert fitted.kernel("Q4_K", 1) == pytest.approx(PROFILE.kernel("Q4_K", 1) / 0.8)
    assert fitted.layer_s == pytest.approx(1.5 * PROFILE.layer_s)
    assert fitted.io_cpu == 0.5
    assert fitted.source == "measured 2025-01-01, fitted to 2 runs"
    assert fitted.spread == fit.spread


def test_the_same_runs_applied_twice_are_applied_once() -> None:
    fit = fit_runs(RECORDS, HERE)
    once = apply_fit(PROFILE, fit)
    twice = apply_fit(once, fit_runs(RECORDS, HERE))

    assert twice.source == once.source
    assert dict(twice.factors) == dict(once.factors)
    assert twice.layer_s == pytest.approx(once.layer_s)
    assert dict(twice.disk_bytes_per_s) == pytest.approx(dict(once.disk_bytes_per_s))
    assert dict(twice.bf16_flop_per_s) == pytest.approx(dict(once.bf16_flop_per_s))
    for kind, rates in once.kernel_weights_per_s.items():
        assert dict(twice.kernel_weights_per_s[kind]) == pytest.approx(dict(rates))


def test_another_fit_undoes_the_one_before() -> None:
    fit = fit_runs(RECORDS, HERE)
    back = apply_fit(apply_fit(PROFILE, fit), replace(fit, factors=FACTORS))
    assert back.layer_s == pytest.approx(PROFILE.layer_s)
    assert dict(back.disk_bytes_per_s) == pytest.approx(dict(PROFILE.disk_bytes_per_s))


def test_a_quantile_is_interpolated_linearly() -> None:
    assert quantile([1.0, 2.0, 4.0], 0.5) == 2.0
    assert quantile([1.0, 2.0, 4.0], 0.75) == 3.0
    assert quantile([5.0], 0.9) == 5.0


# Saving and loading


def test_a_saved_record_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "runs.jsonl"
    keep_record(RECORDS[0], path)
    before = path.read_bytes()
    keep_record(RECORDS[1], path)

    assert path.read_bytes().startswith(before)
    assert len(path.read_text().splitlines()) == 2
    assert read_records(path) == RECORDS


def test_records_are_saved_in_the_home() -> None:
    keep_record(RECORDS[0])
    assert records_path().name == "runs.jsonl"
    assert read_records(records_path()) == [RECORDS[0]]


def test_an_unwritable_folder_does_not_fail_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keep_record(RECORDS[0], tmp_path / "file" / "runs.jsonl")
    assert (tmp_path / "file").read_text() == ""


def test_empty_lines_are_no_records(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    keep_record(RECORDS[0], path)
    path.write_text("\n" + path.read_text() + "\n\n")
    assert read_records(path) == [RECORDS[0]]


def changed(**values: object) -> str:
    return json.dumps(asdict(RECORDS[0]) | values)


def of_group(**values: object) -> str:
    return changed(passes=[asdict(RECORDS[0].passes[0]) | values])


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "7",
        "null",
        "[]",
        "[" * 100_000,
        "{}",
        changed(schema=99),
        changed(schema=None),
        changed(unknown=1),
        changed(passes=None),
        changed(passes=[{}]),
        of_group(seconds=0),
        of_group(seconds=-1.0),
        of_group(seconds=float("nan")),
        of_group(disk_s=float("inf")),
        of_group(kernel_s="long"),
        of_group(rows=0),
        of_group(count=0),
    ],
    ids=lambda line: line[-30:],
)
def test_an_invalid_line_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    keep_record(RECORDS[0], path)
    with path.open("a") as file:
        file.write(line + "\n")

    with pytest.raises(UsageError, match="line 2 is no run record") as caught:
        read_records(path)
    assert "remove the line" in str(caught.value.hint)


def test_records_of_an_earlier_schema_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(changed(schema=1) + "\n" + changed() + "\n")
    assert len(read_records(path)) == 1


def test_another_schema_is_named(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(changed(schema=99) + "\n")
    with pytest.raises(UsageError, match="schema 99"):
        read_records(path)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_an_unreadable_file_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "runs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="cannot read") as caught:
        read_records(path)
    assert "headrace run" in str(caught.value.hint)


# Bugs that were found


@pytest.mark.parametrize(
    "line",
    [
        changed(factors={"disk": 0.0}),
        changed(factors={"disk": "fast"}),
        changed(factors=7),
        of_group(disk_s=0, kernel_s=0, layer_s=0),
    ],
    ids=["zero factor", "factor of text", "no factors", "nothing predicted"],
)
def test_a_record_that_cannot_be_fitted_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text((line + "\n") * 4)
    with pytest.raises(UsageError):
        fit_runs(read_records(path), HERE)
