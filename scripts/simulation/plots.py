"""Pictures of results: one panel for each figure, one line for each policy."""

from collections.abc import Callable, Sequence
from pathlib import Path

from simulation.cases import Result

Figure = Callable[[Result], float | None]

PANELS: list[tuple[str, Figure]] = [
    ("completed requests/s", lambda result: result.figures.completed_per_s),
    ("goodput, requests/s", lambda result: result.figures.goodput_per_s),
    ("mean KV use, %", lambda result: 100 * result.kv_use),
    ("median TTFT, s", lambda result: result.figures.ttft_p50_s),
]


def axis_of(results: Sequence[Result]) -> tuple[str, Callable[[Result], float | str]]:
    """What is different between the results, and so goes on the x axis: rates, else instances, else traces."""
    if len({result.rate for result in results}) > 1:
        return "requests per second", lambda result: result.rate or 0.0
    if len({result.instances for result in results}) > 1:
        return "instances", lambda result: result.instances
    return "trace", lambda result: result.trace


def draw(results: Sequence[Result], file: Path, title: str) -> None:
    """Figures by policy over what differs, and KV in use over time. Raises OSError."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    label, place = axis_of(results)
    panels = [(name, figure) for name, figure in PANELS if any(figure(result) is not None for result in results)]
    drawn, axes = plt.subplots(1, len(panels) + 1, figsize=(4.2 * (len(panels) + 1), 3.8), layout="constrained")
    policies = list(dict.fromkeys(result.policy for result in results))
    for panel, (name, figure) in zip(axes, panels, strict=False):
        for policy in policies:
            its = [result for result in results if result.policy == policy and figure(result) is not None]
            panel.plot([place(result) for result in its], [figure(result) for result in its], marker="o", label=policy)
        panel.set_xlabel(label)
        panel.set_title(name)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0].legend()
    last = results[-1]
    for result in results:
        if (result.trace, result.rate, result.instances) == (last.trace, last.rate, last.instances):
            axes[-1].plot([at for at, _ in result.kv_curve], [100 * use for _, use in result.kv_curve], label=result.policy)
    rate = "" if last.rate is None else f", {last.rate:g}/s"
    axes[-1].set_title(f"KV use, %: {Path(last.trace).name}{rate}, {last.instances} instances")
    axes[-1].set_xlabel("s")
    axes[-1].grid(alpha=0.3)
    drawn.suptitle(title)
    drawn.savefig(file, dpi=120)
    plt.close(drawn)
