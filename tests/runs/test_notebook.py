"""The notebook of the first hour runs from its first cell to its last, with small numbers in its cell of settings."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.processes import environment
from tests.support.source_files import ROOT

NOTEBOOK = ROOT / "example" / "first_hour.ipynb"


def test_the_notebook_holds_no_results():
    """If this breaks, everybody's diff holds the pictures and the paths of somebody's machine."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert len(cells) > 4 and not any(cell.outputs or cell.execution_count for cell in cells)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_notebook_runs(tmp_path, monkeypatch):
    """If this breaks, who begins in Colab or Jupyter is left alone with a red cell."""
    notebook = nbformat.read(NOTEBOOK, 4)
    settings = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    settings.source += '\nPAIRS = "example/DPO/heldout.csv"'
    settings.source += f"\nOUT, STEPS, PASSES, TOKENS = Path({str(tmp_path)!r}), 2, 0.1, 4"
    for name, value in environment(IPYTHONDIR=tmp_path, JUPYTER_PLATFORM_DIRS=1).items():
        monkeypatch.setenv(name, value)
    resources = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=100, kernel_name="python3", resources=resources).execute()
    told = str([cell.get("outputs", ()) for cell in notebook.cells])  # some as text, some as HTML
    assert "what is trained on" in told and "after:" in told and (tmp_path / "dpo" / "report.html").is_file()
