"""Where a network to export comes from, in an installation that trains nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of the extra [train] alone; [cuda] has torch without them.
TRAINING_ONLY = ("yaml", "jsonargparse", "PIL", "matplotlib", "sklearn", "torchvision", "rich", "tqdm")


@pytest.mark.parametrize("module", ["rd_deploy.export.source", "rd_deploy.bench.models"])
def test_it_needs_torch_and_nothing_else_of_training(module):
    script = f"import sys\nsys.modules |= dict.fromkeys({TRAINING_ONLY!r})\nimport {module}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
