"""The planner's predictions against what ran: a transformer under every layout of four ranks.

One thread a rank. The machine is measured again before each repetition, all layouts are run, and each gives a
time error and a correlation of the rankings; bytes do not change. Limits are what was agreed.
"""

from statistics import median

from companion import data, hybrid_machine, hybrid_plan, hybrid_steps, launch, layouts, measure
from companion.layouts import Layout

RANKS, BATCH_SIZE, SHAPE, REPEATS = 4, 64, {"width": 256, "layers": 4, "heads": 8}, 5
LAYOUTS = [
    Layout(4),
    Layout(4, sharding="parameters"),
    Layout(tensor=4),
    Layout(2, 2, sharding="parameters"),
    Layout(2, pipeline=2, micro_batches=4),
    Layout(2, pipeline=2, micro_batches=8),
    Layout(pipeline=4, micro_batches=8),
    Layout(pipeline=4, micro_batches=16),
]


def row(what: str, ours: str, limit: str) -> dict:
    return {
        "what": what,
        "plain": "-",
        "ours": ours,
        "limit": limit,
        "against plain": "-",
        "of the limit": "-",
    }


def measure_all(rounds: int = 7) -> list[dict]:
    job = hybrid_steps.transformer(data.load("digits"), BATCH_SIZE, **SHAPE)
    work, options = hybrid_plan.workload(job), {"device": "cpu", "threads": 1}
    errors, correlations, right, times = [], [], [], {}
    for _ in range(REPEATS):
        here = launch.run(hybrid_machine.measured, RANKS, job, **options)[0]
        found = {
            layout: launch.run(hybrid_steps.run, RANKS, job, layout, 2, rounds, **options)
            for layout in LAYOUTS
        }
        measured = {str(layout): ranks[0].seconds for layout, ranks in found.items()}
        predicted = {
            str(layout): layouts.estimate(layout, work, BATCH_SIZE, here).step_seconds for layout in found
        }
        fits = hybrid_plan.agreement(measured, predicted)
        errors.append(fits.median_error)
        correlations.append(fits.rank_correlation)
        right.append(fits.best_found)
        for name, spread in measured.items():
            times.setdefault(name, []).append((1e3 * spread.median, 1e3 * predicted[name]))
    held, sent = [], []
    for layout, ranks in found.items():
        most = max(sum(rank.held.values()) for rank in ranks)
        held.append(abs(sum(layouts.held_bytes(layout, work, BATCH_SIZE).values()) / most - 1))
        mean = sum(sum(rank.sent.values()) for rank in ranks) / RANKS
        sent.append(abs(sum(layouts.sent_bytes(layout, work, BATCH_SIZE).values()) / mean - 1))
    shown = "; ".join(
        f"{name}: {median(one for one, _ in pairs):.0f} ({median(guess for _, guess in pairs):.0f})"
        for name, pairs in times.items()
    )
    where = f"{len(LAYOUTS)} layouts of {RANKS} ranks, {REPEATS} times"
    return [
        row(f"plan: bytes held, largest error, {where}", f"{max(held):.1%}", "2 % (agreed)"),
        row(f"plan: bytes sent, largest error, {where}", f"{max(sent):.1%}", "-"),
        row(f"plan: seconds, median error, {where}", f"{measure.Spread.of(errors):.0%}", "20 % (agreed)"),
        row(
            f"plan: correlation of the rankings, {where}",
            f"{measure.Spread.of(correlations):.2f}",
            "0.8 (agreed)",
        ),
        row(f"plan: the fastest layout found, {where}", f"{sum(right)} of {len(right)}", "all (agreed)"),
        row(f"plan: ms, predicted ones in brackets, {where}", shown, "-"),
    ]
