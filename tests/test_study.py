"""Studies: the plan, running and resuming, and the table."""

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from configs import ablations, mvtec
from prn_jax import results, study, study_tables
from prn_jax.errors import Interrupted, UserError
from prn_jax.fields import checked
from prn_jax.identity import as_dict, lock

CATEGORIES, SEEDS = ("bottle", "metal_nut"), (0, 2)


def make_plan(workdir):
    config = mvtec.get_config()
    config.backbone.weights = "random"
    config = checked(config)
    return study.plan(config, CATEGORIES, SEEDS, workdir, ["--config=configs/mvtec.py"])


def test_a_run_of_a_study_may_go_on_with_a_change(tmp_path):
    config = checked(make_plan(tmp_path)[0].config)
    runs = study.plan(config, CATEGORIES, SEEDS, tmp_path, [], allow_config_change=True)
    assert all(x.allow_config_change and "--allow_config_change" in x.command for x in runs)
    assert not any("--allow_config_change" in x.command for x in make_plan(tmp_path))


def test_a_seed_that_no_run_takes_is_refused_at_once(tmp_path):
    config = make_plan(tmp_path)[0].config
    with pytest.raises(UserError, match="seed=20240101123: give"):
        study.plan(config, CATEGORIES, (20240101123,), tmp_path, [])


def finish(run, value):
    found = {
        "category": run.category,
        "dataset": "mvtec_ad",
        "metrics": {column: value for column in results.COLUMNS} | {"pixel_ap": None},
        "config": as_dict(run.config),
    }
    results.write_run(run.folder, found)


def test_each_run_has_its_seed_split_and_folder(tmp_path):
    runs = make_plan(tmp_path)
    assert [(run.seed, run.category) for run in runs] == [
        (0, "bottle"), (0, "metal_nut"), (2, "bottle"), (2, "metal_nut"),
    ]  # fmt: skip
    assert [run.config.split_seed for run in runs] == [42, 42, 44, 44]
    last = runs[-1]
    assert last.folder == last.workdir / "metal_nut"
    assert last.command[1:4] == ["-m", "prn_jax", "train"]
    for part in ("--config=configs/mvtec.py", f"--workdir={tmp_path}/seed_2", "--config.seed=2",
                 "--config.split_seed=44", "--config.category=metal_nut"):  # fmt: skip
        assert part in last.command


def test_overrides_are_passed_on_and_other_flags_are_not():
    given = ["--config", "configs/a.py", "--config.x=1", "--seeds=0", "--config.y", "2", "--slurm"]
    kept = study.overrides_of(given)
    assert kept == ["--config", "configs/a.py", "--config.x=1", "--config.y", "2"]
    vary = ["--vary", "--config.x=0,3", "--vary=config.y=1,2", "--config.z=4"]
    assert study.overrides_of(vary) == ["--config.z=4"]
    for given in (["--noconfig.x"], ["-noconfig.x"]):
        assert study.overrides_of(given) == given


def test_the_tables_have_means_deviations_and_the_paper_s_figures(tmp_path):
    runs = make_plan(tmp_path)
    values = [0.91, 0.95, 0.93, 0.98]
    for run, value in zip(runs, values):
        finish(run, value)
    rows = study_tables.summarise(study_tables.read(runs))
    assert [row[:2] for row in rows] == [("bottle", 2), ("metal_nut", 2), ("mean", 2)]
    bottle, nut, mean = (row[2]["image_auroc"] for row in rows)
    np.testing.assert_allclose(bottle, (0.92, np.std([0.91, 0.93], ddof=1)))
    np.testing.assert_allclose(nut, (0.965, np.std([0.95, 0.98], ddof=1)))
    np.testing.assert_allclose(mean, (0.9425, np.std([0.93, 0.955], ddof=1)))
    assert rows[0][2]["pixel_ap"] is None
    study_tables.write_tables(rows, tmp_path, "mvtec_ad", "of a network")
    with (tmp_path / "study.csv").open() as file:
        table = list(csv.DictReader(file))
    assert float(table[2]["image_auroc_mean"]) == pytest.approx(0.9425)
    assert float(table[1]["image_auroc_paper"]) == pytest.approx(1.0)
    assert float(table[2]["pro_paper"]) == pytest.approx((0.97 + 0.958) / 2)
    assert table[0]["pixel_ap_mean"] == ""
    text = (tmp_path / "study.md").read_text()
    assert "| bottle | 2 | 92.0 ± 1.4 | 100.0 |" in text
    assert "| paper† |" in text
    assert "of a network. Percent" in text
    latex = (tmp_path / "study.tex").read_text()
    assert r"metal\_nut & 2 & 96.5 $\pm$ 2.1 & 100.0" in latex
    counts = {line.count("&") for line in latex.splitlines() if "&" in line}
    assert len(counts) == 1
    assert latex.splitlines()[-5] == r"\midrule"  # above the mean


def test_of_all_categories_the_mean_beside_is_the_one_that_the_paper_states(tmp_path):
    figure = dict.fromkeys(results.COLUMNS, (0.9, None))
    rows = [(name, 1, figure) for name in (*results.PAPER["mvtec_ad"], "mean")]
    study_tables.write_tables(rows, tmp_path, "mvtec_ad", "of a network")
    # The quoted figures' mean is 99.2.
    assert "| mean | 1 | 90.0 | 99.4 | 90.0 | 99.0 |" in (tmp_path / "study.md").read_text()
    assert (tmp_path / "study.tex").read_text().splitlines()[-1].startswith("% The paper's")


def test_an_unfinished_study_has_the_table_of_what_is_there(tmp_path):
    runs = make_plan(tmp_path)
    finish(runs[0], 0.9)
    rows = study_tables.summarise(study_tables.read(runs))
    assert rows[0][1:] == (1, {c: (0.9, None) for c in results.COLUMNS} | {"pixel_ap": None})
    assert rows[1][1] == rows[2][1] == 0
    study_tables.write_tables(rows, tmp_path, "mvtec_ad", "of a network")
    assert "| metal_nut | 0 | - | 100.0 |" in (tmp_path / "study.md").read_text()


def test_runs_are_resumed_and_one_failure_does_not_stop_the_others(tmp_path):
    runs = make_plan(tmp_path)
    finish(runs[0], 0.9)

    def replaced(run):
        if run is runs[1]:
            code = "import sys; sys.exit('error: no luck')"
        else:
            content = {"category": run.category, "dataset": "mvtec_ad",
                       "metrics": dict.fromkeys(results.COLUMNS, 0.8),
                       "config": as_dict(run.config)}  # fmt: skip
            path = run.folder / "results.json"
            code = (
                "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir();"
                "p.write_text(sys.argv[2])"
            )
            return [sys.executable, "-c", code, str(path), json.dumps(content)]
        return [sys.executable, "-c", code]

    runs = [dataclasses.replace(run, command=replaced(run)) for run in runs]
    failed = study.execute(runs, tmp_path, parallel=2)
    assert failed == [runs[1]]
    assert [run.is_finished() for run in runs] == [True, False, True, True]
    assert results.read_run(runs[0].folder)["metrics"]["image_auroc"] == 0.9  # not run again
    assert "no luck" in (tmp_path / "seed_0/metal_nut.log").read_text()
    changed = runs[0].config.copy_and_resolve_references()
    changed.batch_size = 8
    with pytest.raises(UserError, match="batch_size was 64, is 8"):
        dataclasses.replace(runs[0], config=changed).is_finished()
    # Of one that was interrupted the checkpoint tells, before any other run begins.
    stored = runs[1].folder / "checkpoints/4/config/metadata"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps(as_dict(changed) | {"steps": 9}))
    with pytest.raises(UserError, match=r"checkpoint of step 4 .*batch_size was 8, is 64"):
        study.execute(runs, tmp_path, parallel=1)
    allowed = dataclasses.replace(runs[1], allow_config_change=True)
    assert not allowed.is_finished()


def test_a_study_that_is_stopped_stops_its_runs_which_save(tmp_path):
    code = "trap 'kill $!; echo saved; exit 143' TERM; echo begun; sleep 60 & wait"
    runs = [dataclasses.replace(x, command=["bash", "-c", code]) for x in make_plan(tmp_path)[:2]]

    def logs():
        return [path.read_text() for path in tmp_path.rglob("*.log")]

    def stop():
        while sum("begun" in log for log in logs()) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopping = threading.Thread(target=stop, daemon=True)
    stopping.start()
    with pytest.raises(Interrupted, match="stopped and saved; the same command goes on"):
        study.execute(runs, tmp_path, 2)
    assert all("saved" in log for log in logs())


def test_weights_that_cannot_be_had_end_a_study_before_its_runs(tmp_path):
    runs = make_plan(tmp_path)
    for run in runs:
        run.config.backbone.weights = str(tmp_path / "missing.npz")
    with pytest.raises(UserError, match=r"missing\.npz"):
        study.execute(runs, tmp_path, 1)
    assert not list(tmp_path.rglob("*.log"))


def test_two_studies_do_not_share_a_folder(tmp_path):
    runs = make_plan(tmp_path)
    with lock(tmp_path, "study"), pytest.raises(UserError, match="another study"):
        study.execute(runs, tmp_path, 1)


def test_devices_are_shared_out(monkeypatch):
    assert study._devices(0, 1, 64) == {}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert study._devices(1, 2, 64)["CUDA_VISIBLE_DEVICES"] == "5,7"
    assert study._devices(5, 8, 64)["CUDA_VISIBLE_DEVICES"] == "5"
    for count, parallel in ((4, 5), (2, 3), (3, 8), (8, 3), (4, 4)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count))))
        taken = np.zeros(count)
        for slot in range(parallel):
            found = study._devices(slot, parallel, 64)
            mine = found["CUDA_VISIBLE_DEVICES"].split(",")
            assert 64 % len(mine) == 0
            taken[[int(x) for x in mine]] += float(found["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        assert 0 < taken.max() <= 0.91
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert study._devices(0, 2, 64) == {}


def test_the_job_array_is_a_script_that_names_every_run(tmp_path):
    script = study.slurm_array(make_plan(tmp_path), 2)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "#SBATCH --array=0-3%2" in script
    # Its last lines, run as Slurm would.
    lines = script.replace("source .venv/bin/activate", 'python() { echo "$@"; }')
    lines = lines.replace("exec ", "")
    result = subprocess.run(
        ["bash", "-c", lines], text=True, capture_output=True, check=True,
        env={"SLURM_SUBMIT_DIR": "/", "SLURM_ARRAY_TASK_ID": "2", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert "--config.seed=2" in result.stdout
    assert "--config.category=bottle" in result.stdout


def test_fields_make_a_grid_and_commas_in_brackets_belong_to_a_value():
    grid = study.vary(["config.attention.layers=0,3", "attention.divisions=(1,2),(4,)"])
    assert list(grid.values()) == [
        {"attention.layers": layers, "attention.divisions": divisions}
        for layers in ("0", "3")
        for divisions in ("(1,2)", "(4,)")
    ]
    changed = study.varied_config(mvtec.get_config(), list(grid.values())[0])
    assert (changed.attention.layers, changed.attention.divisions) == (0, (1, 2))
    textures = study.vary([""" config.synthesis.textures="",'a,b',/d/O'Brien"""])
    assert [x["synthesis.textures"] for x in textures.values()] == ["", "a,b", "/d/O'Brien"]
    name = study.folder_name("synthesis.textures=" + "布" * 90)
    assert len(name.encode()) < 200
    for wrong in (["attention.layers"], ["a=1", "config.a=2"], ["a=1,"], ["a='1"], ["a='"],
                  ["config.seed=1,2"], ["category=bottle,pill"]):  # fmt: skip
        with pytest.raises(UserError, match="--vary"):
            study.vary(wrong)
    for wrong in ({"attention.layer": "1"}, {"attention.layers": "many"}):
        with pytest.raises(UserError, match="attention") as error:
            study.varied_config(mvtec.get_config(), wrong)
        assert "\\" not in str(error.value)


def test_a_varied_study_has_a_row_per_variation(tmp_path):
    config = checked(mvtec.get_config())
    variations = ablations.variations(config)
    runs = study.plan(
        config, CATEGORIES, SEEDS, tmp_path, ["--config=configs/mvtec.py"], variations
    )
    assert len({run.folder for run in runs}) == len(runs) == 7 * 4
    assert all(run.folder.parent.parent == tmp_path for run in runs)  # where the report looks
    for run in runs:
        finish(run, 0.8 if run.variation == "without attention" else 0.9)
        shares = run.config.sampling
        assert sum(shares.values()) == pytest.approx(1.0)
    without = next(run for run in runs if run.variation == "without extended")
    assert (without.config.sampling.extended, without.config.sampling.normal) == (0.0, 0.5)
    assert "--config.sampling.extended=0.0" in without.command
    study_tables.write_study(runs, tmp_path, "mvtec_ad")
    text = (tmp_path / "study.md").read_text()
    assert "| without attention | 2 | 80.0 ± 0.0 |" in text
    assert "| PRN | 2 | 90.0 ± 0.0 |" in text
    assert text.count("resnet18, 3 attention layers; 700 epochs, batches of 64, 256x256.") == 6
    assert text.count("resnet18, 0 attention layers;") == 1
    with (tmp_path / "study.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 7 * 3
    assert table[6]["variation"] == "without attention"
    assert float(table[6]["image_auroc_mean"]) == pytest.approx(0.8)
    assert (tmp_path / "study.tex").read_text().count(r"\midrule") == 1  # no mean is set off


def test_rows_are_of_the_same_seeds_and_categories():
    def metrics(value):
        return dict.fromkeys(results.COLUMNS, value)

    full = {"a": {0: metrics(0.5), 1: metrics(0.7)}, "b": {0: metrics(0.9), 1: metrics(0.9)}}
    less = {"a": {1: metrics(0.6)}, "b": {1: metrics(0.8) | {"pro": None}}}
    rows, seeds = study_tables.compare({"all": full, "less": less})
    assert seeds == [1]
    assert [row[1] for row in rows] == [1, 1]
    assert rows[0][2]["image_auroc"] == (pytest.approx(0.8), None)
    assert rows[1][2]["image_auroc"] == (pytest.approx(0.7), None)
    assert rows[1][2]["pro"] is None  # it would be that of other categories


def test_what_a_configuration_lacks_is_no_ablation():
    config = mvtec.get_config()
    config.num_seen = 0
    config.fusion.enabled = False
    assert list(ablations.variations(config)) == ["PRN", "without prototypes", "without attention"]
    config.num_seen, config.sampling.simulated = 10, 0.0
    assert list(ablations.variations(config))[3:] == ["without extended", "without seen"]
    config.total_steps = 0
    with pytest.raises(UserError, match="total_steps=0"):
        ablations.variations(config)
