from sparsemoe.evaluate import plot_runs

RECORDS = [
    {"step": s, "bytes": 100 * s, "bits_per_byte": 8.0 / s, "load": [[0.5, 0.5], [0.9, 0.1]]}
    for s in range(1, 6)
] + [{"step": 5, "validation_bits_per_byte": 2.0}]


def test_writes_a_picture(tmp_path):
    dense = [{k: v for k, v in r.items() if k != "load"} for r in RECORDS]
    path = plot_runs(tmp_path / "new/plot.png", {"moe": RECORDS, "dense": dense}, xz=1.9)
    assert path.read_bytes().startswith(b"\x89PNG")
    taller = path.stat().st_size
    assert plot_runs(tmp_path / "dense.png", {"dense": dense}).stat().st_size < taller
