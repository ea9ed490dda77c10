"""README.md and the pages under docs/ say what the committed results say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]


def test_the_pages_are_made_from_the_results():
    checked = subprocess.run(SCRIPT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_changed_figure_is_noticed(tmp_path):
    copy = tmp_path / "benchmarks"
    copy.mkdir()
    for path in (ROOT / "benchmarks").rglob("*.json"):
        target = copy / path.relative_to(ROOT / "benchmarks")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (copy / "tables.py").write_bytes((ROOT / "benchmarks" / "tables.py").read_bytes())
    (tmp_path / "docs").mkdir()
    for page in (ROOT / "docs").glob("*.md"):
        (tmp_path / "docs" / page.name).write_bytes(page.read_bytes())
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (tmp_path / "README.md").write_text(readme.replace("x (", "y (", 1), encoding="utf-8")
    changed = subprocess.run([sys.executable, str(copy / "tables.py"), "--check"], capture_output=True, text=True)
    assert changed.returncode == 1
    assert changed.stdout.startswith("README.md differs")
