"""The loss as it falls: a figure in the notebook that is drawn again while fine-tuning runs."""

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.figure import Figure
from transformers import TrainerCallback


def figure_loss(curve: list[dict]) -> Figure:
    """Draw `finetune.train`'s curve: the loss of each step's batch, and where it was measured, the held-out loss."""
    figure, ax = plt.subplots(figsize=(6, 3), layout="constrained")
    plt.close(figure)
    ax.plot([c["step"] for c in curve], [c["loss"] for c in curve], label="training batch")
    held_out = [(c["step"], c["held_out_loss"]) for c in curve if c.get("held_out_loss") is not None]
    if held_out:
        ax.plot(*zip(*held_out, strict=True), "o", label="images kept back")
    ax.set(xlabel="optimizer step", ylabel="loss on answers (nats per token)", ylim=(0, None))
    ax.legend(frameon=False)
    return figure


class LiveCurve(TrainerCallback):
    """Show `figure_loss` below the cell, and again at every twentieth of the steps."""

    def __init__(self):
        self.curve, self.shown = {}, None

    def on_log(self, args, state, control, logs=None, **_):
        for name, ours in (("loss", "loss"), ("eval_loss", "held_out_loss")):
            if name in (logs or {}):
                self.curve.setdefault(state.global_step, {"step": state.global_step})[ours] = logs[name]
        points = [c for c in self.curve.values() if "loss" in c]
        if points and (state.global_step % max(1, state.max_steps // 20) == 0 or state.global_step == state.max_steps):
            if self.shown is None:
                self.shown = display(figure_loss(points), display_id=True)
            else:
                self.shown.update(figure_loss(points))
