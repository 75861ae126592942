"""The report, in a real browser where there is one."""

import contextlib
import re
import shutil
import urllib.parse

import numpy as np
import pytest
from clu import metric_writers

from prn_jax import explain, metrics, report, results
from prn_jax.errors import UserError
from prn_jax.splits import Images

SIZE = (40, 56)


def make_run(workdir, category, normal=12, anomalous=9):
    """A run's folder with made-up, partly wrong predictions."""
    rng = np.random.default_rng(len(category))
    count = normal + anomalous
    defects = ["good"] * normal + ["crack", "</script><b>stain"] * anomalous
    defects = defects[:count]
    masks = np.zeros((count, *SIZE), np.uint8)
    masks[normal:, 10:20, 10:30] = 1
    maps = 0.3 * rng.random((count, *SIZE)).astype(np.float32) + 0.4 * masks
    scores = np.concatenate([rng.uniform(0.1, 0.6, normal), rng.uniform(0.4, 0.9, anomalous)])
    images = rng.integers(0, 256, (count, *SIZE, 3)).astype(np.uint8)
    run = {
        "category": category,
        "dataset": "mvtec_ad",
        "metrics": dict.fromkeys(results.COLUMNS, 0.9),
        "thresholds": {
            "image": 0.5,
            "pixel": 0.5,
            "distance": 2.0,
            "source": "F1-max on the test split",
            "rates": [
                {"rate": 0.01, "images": 20, "needed": 99},
                {
                    "rate": 0.05,
                    "images": 20,
                    "value": 0.55,
                    "recall": 0.75,
                    "false_alarms": None,
                    "source": "20 held-out images",
                    "promise": "on average at most 5 %",
                },
            ],
        },
        "steps": 100,
        "split": {"seed": 42, "seen": ["test/crack/100"]},
        "test": [
            {
                "id": f"test/{d}/{i:03d}",
                "defect": d,
                "score": float(s),
                "distance": 0.3 * i,
                "nearest": f"train/good/{i % 2}",
            }
            for i, (d, s) in enumerate(zip(defects, scores))
        ],
        "config": {
            "batch_size": 8,
            "image_size": list(SIZE),
            "backbone": {"name": "resnet18", "doublings": [0]},
            "attention": {"layers": 3},
        },
        "seed": 0,
        "provenance": {"device": {"count": 1, "kind": "cpu"}, "versions": {"jax": "1"}},
        "timing": {"train_seconds": 120.0, "train_steps": 100},
        "parameters": 7,
    }
    folder = workdir / category
    results.write_run(folder, run)
    test = Images(images, masks, defects, [x["id"] for x in run["test"]])
    results.write_predictions(folder, test, maps)
    ids = [f"train/good/{i}" for i in range(3)]
    explain.Normals.of(ids, images[:3], rng.random((3, 5))).write(folder / "checkpoints")
    with contextlib.closing(metric_writers.SummaryWriter(str(folder))) as writer:
        for step in range(10, 101, 10):
            writer.write_scalars(step, {"loss": 1 / step, "focal": 0.1 / step})
    return run


def test_a_workdir_without_results_is_named(tmp_path):
    make_run(tmp_path, "cup")
    with pytest.raises(UserError, match=f"no results below .*finished training, {tmp_path}$"):
        report.write_report(tmp_path / "cup", tmp_path / "report.html")
    shutil.rmtree(tmp_path / "cup")
    with pytest.raises(UserError, match="no results below"):
        report.write_report(tmp_path, tmp_path / "report.html")
    run = make_run(tmp_path, "bottle")
    results.write_run(tmp_path / "bottle", run | {"test": run["test"][1:]})
    with pytest.raises(UserError, match="different runs"):
        report.write_report(tmp_path, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_any_name_is_a_link_and_unknown_masks_are_in_no_curve(tmp_path, monkeypatch):
    name, ranked = "50%_<!--<script>", []
    run = make_run(tmp_path, name)
    test, maps, _ = results.read_predictions(tmp_path / name)
    test.mask[-2:] = 0  # of two defects nothing is known
    results.write_predictions(tmp_path / name, test, maps)
    rank = metrics.rank_pixels
    monkeypatch.setattr(metrics, "rank_pixels", lambda *x: ranked.append(x) or rank(*x))
    report.write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (link,) = re.findall(r'href="#([^"]+)"', page)
    assert urllib.parse.unquote(link) == name
    assert "<!--<script" not in page.split("</table>", 1)[1]
    ((_, masks, roi, known),) = ranked
    assert roi is None
    assert known.tolist() == [True] * (len(run["test"]) - 2) + [False] * 2


def test_runs_of_different_configurations_have_no_mean(tmp_path):
    runs = {name: make_run(tmp_path, name) for name in ("bottle", "pill")}
    report.write_report(tmp_path, tmp_path / "report.html")
    assert ">mean</td>" in (page := (tmp_path / "report.html").read_text())
    assert "2 runs: resnet18, 3 attention layers, 40x56 pixels." in page
    assert "<td>90.0<small>-10.0</small></td>" in page  # bottle's image AUROC, the paper's is 100
    runs["pill"]["config"] |= {"fusion": {"enabled": False}, "image_size": [56, 56], "seed": 1}
    results.write_run(tmp_path / "pill", runs["pill"])
    report.write_report(tmp_path, tmp_path / "report.html")
    assert ">mean</td>" not in (page := (tmp_path / "report.html").read_text())
    assert "No means: the runs differ in more than category and seed." in page
    assert "2 runs. In percent." in page


def test_the_mean_is_over_categories_however_many_seeds_each_has(tmp_path):
    paper = results.PAPER["mvtec_ad"]
    runs = [("seed_0/carpet", "carpet"), ("seed_0/pill", "pill"), ("seed_1/pill", "pill")]
    for name, category in runs:
        run = make_run((tmp_path / name).parent, category)
        figures = dict.fromkeys(results.COLUMNS) | paper[category]
        results.write_run(tmp_path / name, run | {"metrics": figures})
    report.write_report(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    (row,) = re.findall(r'<tr class="mean">.*?</tr>', page)
    for column in paper["pill"]:
        expected = 100 * (paper["carpet"][column] + paper["pill"][column]) / 2
        assert f"<td>{expected:.1f}<small>+0.0</small></td>" in row or (
            f"<td>{expected:.1f}<small>-0.0</small></td>" in row
        )


def test_a_curve_goes_on_to_the_edge_of_its_chart():
    lines = [("pixels", np.array([0.0, 0.1, 0.9]), np.array([0.0, 0.6, 1.0]))]
    drawn = report._chart("PRO", lines, "rate", "overlap", (0, 0.3), (0, 1))
    (points,) = re.findall(r'points="(.*?)"', drawn)
    *_, last = (tuple(map(float, x.split(","))) for x in points.split())
    assert last[0] == pytest.approx(report._LEFT + report._WIDTH, abs=0.1)
    assert last[1] == pytest.approx(report._HEIGHT * (1 - 0.7), abs=0.1)


def test_training_curves_keep_the_later_of_two_runs(tmp_path):
    for number in range(2):
        with contextlib.closing(metric_writers.SummaryWriter(str(tmp_path))) as writer:
            for step in range(4 * number, 10):
                writer.write_scalars(step, {"loss": float(number)})
    steps, values = report._read_scalars(tmp_path, "loss")
    assert steps.tolist() == list(range(10))
    assert values.tolist() == [0.0] * 4 + [1.0] * 6


@pytest.fixture
def browser():
    paths = shutil.which("chromium"), shutil.which("chromedriver")
    if None in paths:
        pytest.skip("no chromium and chromedriver (Debian: chromium, chromium-driver)")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update",
                     "--disable-sync", "--disable-dev-shm-usage"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(paths[1]))
    yield driver
    driver.quit()


@pytest.mark.slow
def test_the_report_works_in_a_browser(tmp_path, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    runs = {name: make_run(tmp_path, name) for name in ("bottle", "pill")}
    runs["bottle"]["thresholds"]["rates"] = []  # nothing was held out
    results.write_run(tmp_path / "bottle", runs["bottle"])
    report.write_report(tmp_path, tmp_path / "report.html")
    browser.get((tmp_path / "report.html").as_uri())

    def find(name):
        return browser.find_element(By.ID, name)

    def matrix():
        return {name: int(find(name).text) for name in ("tp", "fp", "tn", "fn")}

    def expected(test, threshold):
        counts = dict.fromkeys(("tp", "fp", "tn", "fn"), 0)
        for entry in test:
            called = entry["score"] >= threshold
            kind = "tf"[called != (entry["defect"] != "good")] + "np"[called]
            counts[kind] += 1
        return counts

    def cards():
        return browser.find_elements(By.CSS_SELECTOR, "#gallery .card")

    for name, run in runs.items():
        Select(find("run")).select_by_visible_text(name)
        assert find("heading").text == name
        assert matrix() == expected(run["test"], 0.5)
        assert len(cards()) == len(run["test"])
        assert find("promises").is_displayed() == bool(run["thresholds"]["rates"])

    # The hardest error comes first.
    def hardness(entry):
        distance = entry["score"] - 0.5
        return distance if entry["defect"] == "good" else -distance

    hardest = max(run["test"], key=hardness)
    assert hardest["id"] in cards()[0].text
    # The slider, by keyboard, recounts.
    before = matrix()
    slider = find("threshold")
    slider.send_keys(Keys.HOME)
    lowest = min([0.5, *(entry["score"] for entry in run["test"])])
    assert matrix() == expected(run["test"], lowest) != before
    find("reset").click()
    assert matrix() == before
    # A promised rate of false alarms sets its threshold; one that is not to be had says so.
    assert "takes 99 normal images" in find("promises").text
    find("promises").find_element(By.TAG_NAME, "button").click()
    assert matrix() == expected(run["test"], 0.55)
    find("reset").click()
    far = [entry for entry in run["test"] if entry["distance"] >= 2.0]
    assert sum("unfamiliar" in card.text for card in cards()) == len(far)
    # Filters.
    Select(find("outcome")).select_by_value("fn")
    assert len(cards()) == before["fn"]
    Select(find("outcome")).select_by_value("")
    Select(find("defect")).select_by_value("crack")
    assert len(cards()) == sum(entry["defect"] == "crack" for entry in run["test"])
    Select(find("order")).select_by_value("high")
    shown = [float(re.search(r" (\d\.\d{3}) ", " ".join(x.text.split()))[1]) for x in cards()]
    assert shown == sorted(shown, reverse=True)
    # One image, and the next by the arrow key.
    cards()[0].send_keys(Keys.ENTER)
    first = find("d-name").text
    find("detail").send_keys(Keys.ARROW_RIGHT)
    assert find("d-name").text != first
    for name in ("d-image", "d-normal"):
        width = browser.execute_script(f"return document.getElementById('{name}').naturalWidth")
        assert width == SIZE[1]
    assert find("d-nearest").text.startswith("train/good/")
    find("d-close").click()
    # A telephone: nothing is wider than the screen.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True},
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    # Nothing fails, and nothing is fetched but the page.
    assert browser.get_log("browser") == []
    requested = [
        entry["message"]
        for entry in browser.get_log("performance")
        if "Network.requestWillBeSent" in entry["message"]
    ]
    assert requested
    assert all('"url":"file://' in x or '"url":"data:' in x for x in requested)
    size = (tmp_path / "report.html").stat().st_size
    assert size < 2**20, size
