import io

from rich.console import Console

from sparsemoe.train.progress import LineProgress, LiveProgress, load_bars, make_progress

RECORD = {
    "step": 10,
    "total_steps": 40,
    "bits_per_byte": 3.25,
    "bytes_per_second": 12345.6,
    "load": [[0.5, 0.25, 0.25, 0.0]],
}


def test_lines():
    stream = io.StringIO()
    with LineProgress(every=1000, stream=stream) as progress:
        progress.update({**RECORD, "total_steps": None})
        progress.update({"step": 10, "validation_bits_per_byte": 3.5})
        progress.update({**RECORD, "step": 20})  # too soon
        progress.update({**RECORD, "step": 40})
    assert stream.getvalue() == (
        "step 10/?  bits/byte 3.250  12,346 bytes/s  busiest expert 2.00x the mean\n"
        "step 40/40  bits/byte 3.250  validation 3.500  12,346 bytes/s"
        "  busiest expert 2.00x the mean\n"
    )


def test_live():
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=100)
    with LiveProgress(console) as progress:
        progress.update({"step": 1, "validation_bits_per_byte": 3.5})
        progress.update({**RECORD, "total_steps": None})
        progress.update(RECORD)
    text = stream.getvalue()
    for part in ("10 of 40", "3.250", "3.500", "12,346", "█▅▅▁", "2.00x"):
        assert part in text, part


CODEC = {
    "step": 10,
    "total_steps": 40,
    "bits_per_byte": 0.25,
    "bytes_per_second": 12345.6,
    "byte_accuracy": 0.98765,
    "code_bits": 4.25,
    "perplexity": [800.4, 31.5],
    "code_usage": [1.0, 0.25],
}
VALIDATION = {"step": 10, "validation_bits_per_byte": 0.5, "validation_byte_accuracy": 0.95}


def test_lines_of_a_codec():
    stream = io.StringIO()
    with LineProgress(every=0, stream=stream) as progress:
        progress.update({k: v for k, v in CODEC.items() if k not in ("perplexity", "code_bits")})
        progress.update(VALIDATION)
        progress.update(CODEC)
    assert stream.getvalue() == (
        "step 10/40  bits/byte 0.250  12,346 bytes/s  98.77% right\n"
        "step 10/40  bits/byte 0.250  validation 0.500 (95.00% right)  12,346 bytes/s"
        "  98.77% right  codes 4.25 bits/byte  perplexity 800 32\n"
    )


def test_live_panel_of_a_codec():
    stream = io.StringIO()
    with LiveProgress(Console(file=stream, force_terminal=True, width=100)) as progress:
        progress.update(VALIDATION)
        progress.update(CODEC)
    text = stream.getvalue()
    for part in ("98.77%", "validation 95.00%", "4.250", "stage 1: 800, 100%", "stage 2: 32, 25%"):
        assert part in text, part


def test_lines_without_a_terminal():
    assert isinstance(make_progress(io.StringIO()), LineProgress)


def test_bars():
    assert load_bars([0.25] * 4) == "▅▅▅▅"
    assert load_bars([1.0, 0.0]) == "█▁"
