"""Imports go one way: from the user's side towards the kernels, never back."""

from __future__ import annotations

import ast
from pathlib import Path

import gglspeedup

PACKAGE = Path(gglspeedup.__file__).parent

# A module may import those of earlier lines, and of its own.
LAYERS = [
    ["errors", "__init__", "trace"],
    ["threads", "device", "memory", "interchange", "arguments", "prefetch", "side_stream", "progress"],
    ["device_copies"],
    ["prefetcher", "evaluator_process"],
    ["evaluator_desk"],
    ["evaluator"],
    ["kernels"],
    ["page_file"],
    ["graph_file"],
    ["graph"],
    ["shared_array", "peer_gpu", "pieces", "edges"],
    ["lent_arrays"],
    ["worker_process"],
    ["workers"],
    ["sharded_graph"],
    ["metis", "normalise"],
    ["partitions"],
    ["recordings_gpu", "in_flight"],
    ["workspace_gpu"],
    ["hops_gpu"],
    ["batches_gpu"],
    ["sampler_cpu", "sampler_gpu", "tiers_cpu", "tiers_gpu"],
    ["placement", "adjs"],
    ["gpusample"],
    ["multigpusample"],
    ["hot_order"],
    ["gpufeature"],
    ["multigpufeature"],
    ["memory_meter", "memory_model", "edge_cut"],
    ["memory_budget"],
    ["memory_watch"],
    ["batch_fitter"],
    ["epochs"],
    ["loader"],
    ["subgraphs"],
    ["history"],
    ["distributed"],
    ["span_times"],
    ["profile_summary"],
    ["profile_table", "trace_file", "timeline"],
    ["profiling"],
    ["inference_tables"],
    ["inference"],
    ["info"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """The names of our modules that a file imports, within functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "gglspeedup":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gglspeedup.")}
    return found


def test_imports_go_one_way():
    seen = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name in ("__init__", "adapters"):
            continue
        seen.add(name)
        for other in imported(path):
            if other in ("__version__", "adapters"):
                continue
            assert LEVEL[other] <= LEVEL[name], f"{path.name} imports {other}"
    assert seen == set(LEVEL) - {"__init__"}


def test_kernels_import_nothing_of_ours_but_kernels():
    for path in sorted((PACKAGE / "kernels").glob("*.py")):
        assert imported(path) <= {"kernels", "errors"}, path.name
