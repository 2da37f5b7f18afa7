"""The page that leads to the reports of several categories."""

import re
from dataclasses import replace

import pytest

from patchsvdd_fast.detector.evaluation import AtThreshold, CategoryResult
from patchsvdd_fast.report.html import is_report
from patchsvdd_fast.report.start_page import write_start_page


def _result(name, at_threshold=None):
    percent = {"K64": {"detection": 99.0}, "mult": {"detection": 91.26, "aupro": None}}
    return CategoryResult(name, 10, 20, percent, at_threshold=at_threshold)


def test_it_links_to_the_reports(tmp_path):
    reached = AtThreshold(0.05, 2.0, 3, 20, 1, 10, 0.8, 1.5)
    results = {"a b&c": _result("<b>", reached), "d": _result("d")}
    path = write_start_page(tmp_path / "report", results, {"e": "no <images>"}, "my/data")
    source = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report" / "index.html" and is_report(path)
    assert re.findall(r'href="([^"]*)"', source) == ["a%20b%26c/index.html", "d/index.html"]
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>.*?</tr>", source)[1:]
    ]
    assert rows == [
        ["10", "20", "mult", "91.3", "-", "-", "3 of 20", "1 of 10"],
        ["10", "20", "mult", "91.3", "-", "-", "-", "-"],
    ]
    assert re.findall(r'data-heading="([^"]*)"', source)[:3] == ["good", "anomalous", "map"]
    assert "&lt;b&gt;" in source and "<b>" not in source and "no &lt;images&gt;" in source
    assert "my/data: 2 categories" in source and "{{" not in source


def test_images_for_validation_have_a_column(tmp_path):
    results = {
        "a": replace(_result("a"), num_validation=50, num_false_alarms=2),
        "b": _result("b"),
    }
    source = write_start_page(tmp_path, results, {}, "data").read_text(encoding="utf-8")
    assert '<th scope="col">in validation</th>' in source
    assert re.findall(r"<td[^>]*>([^<]*)</td></tr>", source) == ["2 of 50", "-"]
    one = write_start_page(tmp_path, {"b": _result("b")}, {"a": "no"}, "data").read_text()
    assert "data: 1 category<" in one and "in validation" not in one


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        write_start_page(tmp_path / "file", {}, {}, "data")
