"""The picture of a running level: drawn from its progress alone, and small however long the level is."""

import base64
import re
from dataclasses import replace

from fp8lab.load.generator import Progress
from fp8lab.load.level import LiveChart


def progress(at: float) -> Progress:
    return Progress(
        elapsed_s=at, planned_s=60, requests=600, sent=int(10 * at), in_flight=7, done=0, failed=0,
        tokens_per_s=1234.0, ttft_ms=float("nan") if at < 1 else 50.0,
    )  # fmt: skip


def drawn(picture: str) -> str:
    return base64.b64decode(re.search(r"base64,([^\"]+)", picture)[1]).decode()


def test_the_chart_shows_what_goes_on():
    chart = LiveChart("bf16-10rps-r1")
    assert chart.add(progress(0.5)) == "" == chart.picture()  # a rate needs two samples
    picture = chart.add(progress(1.5))
    assert 'alt="bf16-10rps-r1 after 2 s: sent, requests/s 10, in flight 7, tokens/s 1,234, TTFT, ms 50"' in picture
    assert drawn(picture).count("<polyline") == 4 and "EMULATED" not in drawn(picture)


def test_what_is_not_known_yet_is_not_drawn():
    chart = LiveChart("bf16-10rps-r1")
    for at in (-0.9, 0.2, 0.6, 0.9):
        picture = chart.add(progress(at))
    assert "TTFT, ms –" in picture and "TTFT, ms: – (most –)" in drawn(picture) and 'points=""' in drawn(picture)
    picture = chart.add(progress(1.5))
    *_, ttft = re.findall(r'points="([^"]*)"', drawn(picture))
    assert len(ttft.split()) == 1 and "nan" not in drawn(picture)


def test_the_rate_is_that_of_all_workers_together():
    """Two workers, 50 requests/s each, whose ticks come 10 ms apart."""
    chart, sent = LiveChart("bf16-100rps-r1"), 0
    for tick in range(1, 41):
        for at in (0.25 * tick, 0.25 * tick + 0.01):
            sent += 12.5
            picture = chart.add(replace(progress(at), sent=sent))
    assert "sent, requests/s 100" in picture and "(most 100)" in drawn(picture).replace("most 104", "most 100")


def test_a_long_level_keeps_a_small_picture():
    chart = LiveChart("<long> (EMULATED GPU)")
    for second in range(2000):
        picture = chart.add(progress(float(second)))
    assert len(picture) < 40_000 and "EMULATED" in drawn(picture) and "<long>" not in picture
