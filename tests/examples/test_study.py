"""The study: its rows, its data, a short run on small archives, and the judgement of claims."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_image_data import write_fashion_mnist

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"
sys.path.insert(0, str(STUDY))


def test_rows_have_distinct_names_and_the_papers_temperature_comes_first():
    from rows import rows_of

    rows = rows_of(5000, seeds=2)
    assert len({row.name for row in rows}) == len(rows)
    half = len(rows) // 2
    assert {row.seed for row in rows[:half]} == {0}
    first = [row.temperature in (0.0, 1e-3) for row in rows[:half]]
    assert first == sorted(first, reverse=True)
    assert {row.temperature for row in rows} == {0.0, 1e-3, 1e-2, 1.0}


def test_accumulators_of_16_bits_have_the_range_of_the_weights():
    from rows import make_plugin, rows_of

    wide = {row.format: make_plugin(row).accumulator for row in rows_of(5000, seeds=1) if row.method == "vc-sgldlp-16"}
    assert {name: str(fmt) for name, fmt in wide.items()} == {"fixed8": "fixed16.14", "bfp8": "bfp16"}
    assert wide["fixed8"].min == -2.0


def test_schedule_is_the_papers():
    from rows import Row, decay

    row = Row("fashion-mnist", 5000, "sgld", "fp32", 1e-3, 0)
    assert [round(decay(row, t), 4) for t in (0.0, 0.5, 0.7, 0.9, 1.0)] == [1.0, 1.0, 0.505, 0.01, 0.01]
    cyclical = Row("fashion-mnist", 5000, "csgld", "fp32", 1e-3, 0)
    assert decay(cyclical, 0.9) == 1.0


def test_every_image_is_a_shift_or_a_flip_of_its_original(tmp_path):
    from fashion import Fashion

    write_fashion_mnist(tmp_path, packed=True)
    data = Fashion(tmp_path, 96, batch_size=96)
    data.setup("fit")
    originals, labels = data.train
    padded = torch.nn.functional.pad(originals, (2,) * 4, value=data.background)
    torch.manual_seed(0)
    (images, given) = next(iter(data.train_dataloader()))
    shifts = [padded[:, :, i : i + 28, j : j + 28] for i in range(5) for j in range(5)]
    known = torch.cat([*shifts, *(s.flip(-1) for s in shifts)])
    known_labels = labels.repeat(50)
    flat = {image.numpy().tobytes(): int(label) for image, label in zip(known, known_labels)}
    assert [flat[image.numpy().tobytes()] for image in images.contiguous()] == given.tolist()
    moved = (images != originals).flatten(1).any(1)
    assert moved.float().mean() > 0.5


def test_calibrated_nll_undoes_a_temperature():
    """Probabilities sharpened by a power have the calibrated NLL of the original ones, and a worse NLL."""
    from scores import scores_of

    generator = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).flatten()
    right, sharp = scores_of(logits.softmax(1), targets), scores_of((3 * logits).softmax(1), targets)
    assert sharp["nll"] > 1.1 * right["nll"]
    assert math.isclose(sharp["calibrated_nll"], right["calibrated_nll"], rel_tol=1e-4)
    assert math.isclose(right["calibrated_nll"], right["nll"], rel_tol=0.01)


def test_a_row_runs_once_and_stands_in_the_table(tmp_path):
    write_fashion_mnist(tmp_path, packed=True, train=200, test=40)
    command = [
        sys.executable, str(STUDY / "run.py"), f"--data-dir={tmp_path}", "--size=200", "--epochs=5", "--seeds=1",
        "--only", "vc-sgldlp-l/bfp8/0.001", f"--out={tmp_path / 'rows.csv'}", f"--cache={tmp_path / 'cache'}",
        "--keep-banks",
    ]  # fmt: skip
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    with (tmp_path / "rows.csv").open() as file:
        entries = list(csv.DictReader(file))
    assert [(e["temperature"], e["of"]) for e in entries] == [("0.001", "last"), ("0.001", "ensemble")]
    assert all(0 <= float(e["error"]) <= 1 and float(e["seconds"]) > 0 for e in entries)
    assert all(int(e["samples"]) >= 3 for e in entries if e["of"] == "ensemble")
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 1
    _the_bank_is_shown_foreign_images(tmp_path)


def _the_bank_is_shown_foreign_images(folder: Path) -> None:
    from outliers import OUTLIER_COLUMNS

    command = [sys.executable, str(STUDY / "outliers.py"), f"--data-dir={folder}", "--size=200", "--seeds=1"]
    command += [f"--out={folder / 'outliers.csv'}", f"--cache={folder / 'cache'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (folder / "outliers.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == OUTLIER_COLUMNS
    scores = ["confidence", "entropy", "mutual information"]
    kinds = ["test", "digits", "noise", "moved"]
    assert [(line["images"], line["score"]) for line in lines] == [(kind, score) for kind in kinds for score in scores]
    for line in lines:
        share = [float(line[name]) for name in (("aurc",) if line["images"] == "test" else ("auroc", "fpr95"))]
        assert all(0 <= value <= 1 for value in share)


def test_foreign_images_that_pass_and_errors_by_coverage_are_what_they_are_called():
    from outliers import aurc, false_positives

    known = torch.arange(100.0)
    assert false_positives(known, torch.tensor([94.5, 95.0, 95.5, 200.0])) == pytest.approx(0.5)  # 95 of 100 pass at 95
    wrong = torch.tensor([False, True, False, True])
    assert aurc(torch.tensor([0.0, 1.0, 2.0, 3.0]), wrong) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert aurc(torch.tensor([0.0, 3.0, 1.0, 2.0]), wrong) == pytest.approx((0 + 0 + 1 / 3 + 1 / 2) / 4)


def test_plain_images_are_not_moved_and_belong_to_a_study_of_their_own(tmp_path):
    from fashion import Fashion
    from tables import Study, read, studies

    write_fashion_mnist(tmp_path, packed=True)
    data = Fashion(tmp_path, 96, batch_size=96, name="fashion-mnist-plain")
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    known = {image.numpy().tobytes(): int(label) for image, label in zip(*data.train)}
    assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()
    assert not torch.equal(images, data.train[0])  # shuffled
    with pytest.raises(ValueError, match="use one of fashion-mnist, fashion-mnist-plain"):
        Fashion(tmp_path, 96, name="mnist")

    line = ",5000,sgd,fp32,0,0,last,1,0.1,0.3,0.3,0.1,0.1,0.1,0,1,1"
    header = "data,size,method,format,temperature,seed,of,samples,error,nll,calibrated_nll,brier,ece,ece_paper,t_eff,"
    table = [header + "seconds,sample_mb", "fashion-mnist" + line, "fashion-mnist-plain" + line.replace("0.3", "0.6")]
    (tmp_path / "rows.csv").write_text("\n".join(table) + "\n")
    shifted, plain = studies(tmp_path / "rows.csv")
    assert (shifted.suffix, plain.suffix, Study(60_000, data.name).suffix) == ("", "-plain", "-plain-60000")
    means = [read(tmp_path / "rows.csv", study)["sgd/fp32", 0.0, "last"]["nll"].mean for study in (shifted, plain)]
    assert means == [0.3, 0.6]


def test_a_study_replaces_its_own_lines_only(tmp_path):
    from deep import replace

    def lines(path):
        with path.open() as file:
            return [(entry["data"], entry["nll"]) for entry in csv.DictReader(file)]

    path, one, other = tmp_path / "new" / "table.csv", {"data": "a"}, {"data": "b"}
    replace(path, one, [one | {"nll": "1"}, one | {"nll": "2"}])
    replace(path, other, [other | {"nll": "3"}])
    replace(path, one, [one | {"nll": "4"}])
    assert lines(path) == [("b", "3"), ("a", "4")]


def test_foreign_images_are_scaled_as_the_training_images(tmp_path):
    from fashion import Fashion
    from outliers import foreign_images

    write_fashion_mnist(tmp_path, packed=True, train=20, test=10)
    data = Fashion(tmp_path, 20)
    data.setup("test")
    low, high = data.background, data.background + 1 / data.spread
    for kind, images in foreign_images(data, 8).items():
        assert images.shape == (8, 1, 28, 28), kind
        assert low - 1e-6 <= images.min() <= images.max() <= high + 1e-6, kind
    moved = foreign_images(data, 8)["moved"]
    assert torch.equal(moved[..., 10:, 10:], data.test[0][:8][..., :18, :18])
    assert (moved[..., :10, :] == low).all()


def test_jobs_side_by_side_share_one_table(tmp_path):
    write_fashion_mnist(tmp_path, packed=True, train=200, test=40)
    command = [
        sys.executable, str(STUDY / "run.py"), f"--data-dir={tmp_path}", "--size=200", "--epochs=2", "--seeds=2",
        "--only", "vc-sgldlp-l/bfp8/0.001", "--jobs=2", f"--out={tmp_path / 'rows.csv'}",
        f"--cache={tmp_path / 'cache'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "rows.csv").open() as file:
        entries = list(csv.DictReader(file))
    assert sorted((e["seed"], e["of"]) for e in entries) == sorted((s, o) for s in "01" for o in ("last", "ensemble"))


@pytest.mark.parametrize(
    ("better", "worse", "verdict"),
    [([0.1, 0.11, 0.1], [0.2, 0.21, 0.21], "shown"), ([0.2, 0.21, 0.2], [0.1, 0.11, 0.1], "refuted"),
     ([0.1, 0.2, 0.3], [0.3, 0.1, 0.2], "open"), ([0.1], [0.2], "open: one seed"), ([], [0.2], "not run")],
)  # fmt: skip
def test_claims_are_judged_by_paired_differences(better, worse, verdict):
    from tables import Cell, judge

    cells = {("a/x", 1e-3, "last"): {"nll": Cell(dict(enumerate(better)))},
             ("b/x", 1e-3, "last"): {"nll": Cell(dict(enumerate(worse)))}}  # fmt: skip
    assert judge(cells, "a/x", "b/x", "nll", "last").startswith(verdict)


def test_no_worse_than_a_margin_is_judged_by_the_margin():
    from tables import Cell, judge

    cells = {("a/x", 1e-3, "last"): {"nll": Cell({0: 0.105, 1: 0.104, 2: 0.106})},
             ("b/x", 1e-3, "last"): {"nll": Cell({0: 0.1, 1: 0.1, 2: 0.1})}}  # fmt: skip
    assert judge(cells, "a/x", "b/x", "nll", "last").startswith("refuted")
    assert judge(cells, "a/x", "b/x", "nll", "last", margin=0.01).startswith("shown")


def test_deep_ensembles_and_the_number_of_networks_that_a_posterior_is_worth():
    from deep import deep_ensembles
    from tables import equivalent

    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (400,), generator=generator)
    logits = torch.nn.functional.one_hot(targets, 3) + 1.5 * torch.randn(6, 400, 3, generator=generator)
    table = deep_ensembles(logits.softmax(-1), targets)
    nlls = [entry["calibrated_nll"] for entry in table]
    assert [entry["members"] for entry in table] == [1, 2, 3, 4, 5, 6]
    assert nlls == sorted(nlls, reverse=True)
    assert equivalent(nlls[2], table) == pytest.approx(3.0)
    assert equivalent((nlls[0] + nlls[1]) / 2, table) == pytest.approx(1.5)
    assert equivalent(nlls[0] + 0.1, table) == 0.0
    assert equivalent(nlls[-1] - 0.1, table) == math.inf


def test_tables_and_the_figure_come_from_stored_results(tmp_path):
    from rows import rows_of
    from run import COLUMNS
    from tables import CLAIMS, LOSSES, NO_WORSE

    lines = [",".join(COLUMNS)]
    for number, row in enumerate(rows_of(5_000, 2)):
        for of in ("last", "ensemble"):
            key = (row.data, row.size, row.method, row.format, f"{row.temperature:g}", row.seed, of, 30)
            scores = (0.1, 0.3 + number / 1000, 0.29, 0.15, 0.02, 0.03, 0.001, 10.0, 0.1)
            lines.append(",".join(map(str, key + scores)))
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    runs = [row.name for row in rows_of(5_000, 2)]
    (tmp_path / "rows.json").write_text(json.dumps([{"cpu": "some", "threads": "1", "runs": runs}]))
    deep = ("data,size,members,error,nll,calibrated_nll,brier,ece,ece_paper",
            "fashion-mnist,5000,1,0.1,0.35,0.3,0.15,0.02,0.03", "fashion-mnist,5000,2,0.1,0.33,0.28,0.15,0.02,0.03",
            "fashion-mnist-plain,5000,1,0.1,0.01,0.01,0.15,0.02,0.03")  # fmt: skip
    (tmp_path / "deep_ensembles.csv").write_text("\n".join(deep) + "\n")
    done = subprocess.run(
        [sys.executable, STUDY / "tables.py", "--results", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "tables.md").read_text()
    assert "not run" not in text  # every claim is about rows that the study has
    assert text.count("| open") + text.count("| shown") + text.count("| refuted") == sum(
        map(len, (CLAIMS, NO_WORSE, LOSSES))
    )
    assert "| 1.00 | 1.5 | 1.5 | 15.0 |" in text  # of 0.29, half way between one network and two; 0.1 MB
    assert (tmp_path / "study.png").stat().st_size > 10_000


def test_committed_results_have_the_studys_columns_and_tables():
    from run import COLUMNS

    results = STUDY.parent / "results" / "study"
    with (results / "rows.csv").open() as file:
        entries = list(csv.DictReader(file))
    assert entries
    assert tuple(entries[0]) == COLUMNS
    assert all(math.isfinite(float(e["nll"])) and 0 <= float(e["error"]) <= 1 for e in entries)
    assert (results / "tables.md").exists()
    known = [run for entry in json.loads((results / "rows.json").read_text()) for run in entry["runs"]]
    made = {
        "-".join([e["data"], e["size"], e["method"], e["format"], f"T{float(e['temperature']):g}", f"s{e['seed']}"])
        for e in entries
    }
    assert set(known) == made  # of each it is known where it was made
    assert len(known) == len(made)


def test_the_time_of_a_row_is_that_of_sgd_on_the_same_machine(tmp_path):
    from run import COLUMNS, remember
    from tables import Study, relative_times

    seconds = {("sgd", 0, "a"): 10.0, ("sgd", 1, "b"): 1.0, ("sgld", 0, "a"): 20.0, ("sgld", 1, "b"): 2.0,
               ("swa", 0, "c"): 5.0}  # fmt: skip
    lines = [",".join(COLUMNS)]
    for (method, seed, machine), value in seconds.items():
        lines.append(f"fashion-mnist,100,{method},fp32,0,{seed},ensemble,1,0,0,0,0,0,0,0,{value},1")
        remember(tmp_path / "rows.csv", f"fashion-mnist-100-{method}-fp32-T0-s{seed}", {"cpu": machine})
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    assert relative_times(tmp_path / "rows.csv", Study(100)) == {("sgd/fp32", 0.0): 1.0, ("sgld/fp32", 0.0): 2.0}
    remember(tmp_path / "rows.csv", "fashion-mnist-100-swa-fp32-T0-s0", {"cpu": "b"})  # made again, elsewhere
    assert relative_times(tmp_path / "rows.csv", Study(100))["swa/fp32", 0.0] == 5.0
    remember(tmp_path / "rows.csv", "fashion-mnist-100-swa-fp32-T0-s0", {"cpu": "b", "busy": True})
    assert ("swa/fp32", 0.0) not in relative_times(tmp_path / "rows.csv", Study(100))


def test_peers_run_at_the_cost_of_a_row(tmp_path):
    """Those that need no further package; the others need an environment of their own (see the script)."""
    write_fashion_mnist(tmp_path, packed=True, train=200, test=40)
    command = [
        sys.executable, str(STUDY / "peers.py"), f"--data-dir={tmp_path}", "--size=200", "--epochs=4", "--seeds=1",
        "--only", "swa", "mc-dropout", f"--out={tmp_path / 'rows.csv'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "rows.csv").open() as file:
        entries = list(csv.DictReader(file))
    assert [(e["method"], e["of"]) for e in entries] == [
        (m, of) for m in ("swa", "mc-dropout") for of in ("last", "ensemble")
    ]
    assert len({e["nll"] for e in entries}) == 4  # averages are not the last weights


def test_a_low_accumulator_loses_only_where_the_top_of_a_block_is_a_ceiling():
    """The committed comparison, and that its script still makes such rows."""
    import accumulators

    stored = json.loads((STUDY.parent / "results" / "study" / "accumulators.json").read_text())
    for result in stored.values():
        assert result["seeds"] == 8
        assert set(result["mean, standard error"]) == {*accumulators.METHODS, *accumulators.GAPS}
        again = accumulators.tables(result["runs"])
        for label, (a, b) in accumulators.GAPS.items():
            mean, error = again[label]["train NLL"]
            assert [mean, error] == pytest.approx(result["mean, standard error"][label]["train NLL"], rel=1e-12)
            rows = zip(result["runs"][a], result["runs"][b])
            assert mean == pytest.approx(sum(p["train NLL"] - q["train NLL"] for p, q in rows) / 8)
        assert abs(again["L - F, carrying"]["train NLL"][0]) < 3 * again["L - F, carrying"]["train NLL"][1]
        assert again["L - F, published"]["train NLL"][0] > 10 * again["L - F, published"]["train NLL"][1]
    runs = [accumulators.run(*accumulators.METHODS[label], lr=0.1, epochs=1, seed=3) for label in accumulators.METHODS]
    assert len({run["train NLL"] for run in runs}) == len(runs)
    assert all(abs(run["train NLL"] - runs[0]["train NLL"]) < 0.1 * runs[0]["train NLL"] for run in runs)


def test_the_table_of_an_example_shows_minibatch_noise_beside_the_rounding(capsys):
    sys.path.insert(0, str(STUDY.parent))
    from comparison import Result, print_table

    scores = {f"{kind}/{name}": 0.5 for kind in ("current", "ensemble") for name in ("accuracy", "nll", "ece")}
    noise = {"noise/achieved_over_target": 1.25, "noise/minibatch_over_target": 3.75}
    scores["ensemble/size"] = 4.0
    measured, bare = (Result("a method", scores, [], 1, 4, 0.0, extra=extra) for extra in (noise, {}))
    print_table([measured, bare])
    *_, first, second = capsys.readouterr().out.splitlines()
    assert first.split("|")[-2].split() == ["1.25", "3.75"]
    assert second.split("|")[-2].split() == ["nan", "nan"]


# ---------------------------------------------------------------------------------------- the density, the optimizers


def test_density_naive_widens_as_steps_shrink_and_nothing_else_does():
    """The stored laws, and one of them from scratch; Monte Carlo of 20,000 chains: 5 standard errors."""
    from density import ACCUMULATORS, EXACT, STEP_SIZES, exact, sampled, summary

    stored = json.loads((STUDY.parent / "results" / "study" / "density.json").read_text())["results"]
    assert set(stored) == {*EXACT, *ACCUMULATORS}
    widths = {name: [by_step[f"{lr:g}"]["std"] for lr in STEP_SIZES] for name, by_step in stored.items()}
    naive = widths.pop("naive SGLDLP-L")
    assert naive == sorted(naive)
    assert naive[-1] > 2.5
    for name, found in widths.items():
        assert all(abs(std - 1.0) < 0.005 + 5 / math.sqrt(2 * 20_000) for std in found), name
    for name, update in EXACT.items():
        again = summary(*exact(update, 1e-3))
        assert again["w2"] == pytest.approx(stored[name]["0.001"]["w2"], rel=1e-9)
    values, probability = sampled("fixed16.11", 0.05, chains=4_000, times=3.0)
    assert summary(values, probability)["std"] == pytest.approx(1.0, abs=0.015 + 5 / math.sqrt(2 * 4_000))


def test_stored_optimizers_say_what_the_papers_claim():
    """HALP's gradient ends below LP-SGD's, and at SVRG's; slowing follows q, and compensation takes it back."""
    from optimizers import SOLVERS, interval, log_ratio

    stored = json.loads((STUDY.parent / "results" / "study" / "optimizers.json").read_text())
    assert set(stored["digits"]) == set(SOLVERS)
    for name in SOLVERS:
        mean, low, high = interval(log_ratio(stored["digits"], name))
        if name.startswith("LP-SGD") or name == "LP-SVRG, fixed8.6":
            assert low > 0, name  # LP-SVRG in blocks: the difference is not shown
        assert high > -0.2, name  # nothing is shown to end far below HALP
        assert abs(mean) < 0.2 or not name.startswith("SVRG")
    rows = stored["shrinkage"]
    assert all(row["reached"] for row in rows)
    kinds = ("q", "slowdown", "compensated")
    shares, slow, back = ([sum(row[kind]) / len(row[kind]) for row in rows] for kind in kinds)
    assert shares == sorted(shares, reverse=True)
    assert slow == sorted(slow)
    assert slow[-1] > 2.0
    assert max(back) < 1.1


def test_solvers_and_shrinkage_run_on_a_few_digits():
    from optimizers import Whole, digits, shrinkage, solve

    few = Whole(*(tensor[:300] for tensor in digits().tensors))
    results = solve(few, seeds=1, epochs=2)
    assert all(len(row["gradient"]) == 1 and row["gradient"][0] > 0 for row in results.values())
    free = shrinkage(few, None, 0, False, loss=1.5)
    clipped, back = (shrinkage(few, 4, 0, on, loss=1.5) for on in (False, True))
    assert clipped["q"] < 0.6 < free["q"] == 1.0
    assert back["steps"] < clipped["steps"]
    assert clipped["reached"]
