"""What a plan costs: how far its next-token distributions are from the original's, on the original's own answers.

KL(p || q) in nats a token, teacher-forced, the mean over the tokens of an answer, then over answers (lower is better).
Plans are measured together, block by block: those that agree on all choices below a block share what lies below it, and
each block is made in each width once for all of them.
"""

from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from medprune.answers.prompts import IGNORED
from medprune.device import choose_device
from medprune.models.families import parts
from medprune.progress import progress
from medprune.pruning.leave_one_out import TeacherBatch
from medprune.searching.budget import DROP, FULL, TABLE, TOWER, Plan, Space
from medprune.searching.levels import Levels
from medprune.store import Units

TOP = 512  # most likely tokens of the original that are told apart; the rest of the vocabulary counts as one
PLANS_AT_ONCE = 64  # whose hidden states are held together


def reference(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids (targets, top) of the most likely tokens, and log-probabilities (targets, top + 1), rest last."""
    logp, ids = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]), dim=-1)
    return ids, _with_rest(logp)


def _with_rest(logp: torch.Tensor) -> torch.Tensor:
    """Append the log-probability of all tokens that are not among these (targets, top)."""
    rest = (1 - logp.double().exp().sum(-1, keepdim=True)).clamp(min=1e-9)
    return torch.cat([logp, rest.log().to(logp.dtype)], -1)


def divergence(ids: torch.Tensor, logp: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) (targets,) in nats, over the tokens `ids` and the rest: at most that over the vocabulary.

    ids, logp: `reference` of the original's logits. logits (targets, vocab): the plan's.
    """
    logits = logits.float()
    logq = _with_rest(logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True))
    return (logp.exp() * (logp - logq)).sum(-1)


@dataclass
class Costs:
    """What measures plans on teacher-forced batches: `measure(plans, share)` and `table()`; each plan and batch once.

    batches: `leave_one_out.teacher_batches` of the original's answers, a few images each. units: of a context that
    holds the batches and levels. ran, without_sharing: blocks run so far, and as many as one plan at a time would take.
    """

    levels: Levels
    space: Space
    batches: list[TeacherBatch]
    units: Units
    top: int = TOP
    at_once: int = PLANS_AT_ONCE
    ran: int = 0
    without_sharing: int = 0
    _inputs: dict = field(default_factory=dict)
    _references: dict = field(default_factory=dict)

    def rows(self, plans: list[Plan], share: float = 1.0) -> np.ndarray:
        """Return the plans' costs on each answer (plans, rows) of the first `share` of the batches."""
        numbers = range(max(1, round(share * len(self.batches))))
        missing = {i: [p for p in dict.fromkeys(plans) if _key(p, i) not in self.units] for i in numbers}
        todo = [p for p in dict.fromkeys(plans) if any(p in some for some in missing.values())]
        with progress(len(todo), "plans measured", "plan") as bar:
            for first in range(0, len(todo), self.at_once):
                some = todo[first : first + self.at_once]
                for number, costs in self._walk(some, [i for i in numbers if set(some) & set(missing[i])]):
                    told = zip(some, costs, strict=True)
                    self.units.add_all({_key(plan, number): cost.tolist() for plan, cost in told})
                bar.update(len(some))
        found = {p: [c for i in numbers for c in self.units[_key(p, i)]] for p in dict.fromkeys(plans)}
        return np.array([found[p] for p in plans])

    def measure(self, plans: list[Plan], share: float = 1.0) -> list[float]:
        """Return each plan's cost, the mean over answers."""
        return self.rows(plans, share).mean(1).tolist() if plans else []

    def single(self) -> tuple[list[tuple[int, int]], np.ndarray]:
        """Measure every choice of every site by itself, all others in 16 bits.

        Returns ((site, choice) of each, costs (choices, rows)), the 16-bit choices left out.
        """
        whole = (FULL,) * len(self.space.sites)
        single = [(s, c) for s, price in enumerate(self.space.prices) for c in price if c != FULL]
        plans = [(*whole[:s], c, *whole[s + 1 :]) for s, c in single]
        return single, self.rows(plans)

    @torch.inference_mode()
    def _walk(self, plans: list[Plan], numbers: list[int]) -> list[tuple[int, np.ndarray]]:
        """Run plans through the blocks on some batches; return (number of the batch, costs (plans, its rows))."""
        space = self.space
        before = [(space.choice(p, TOWER), space.choice(p, TABLE)) for p in plans]
        blocks = [space.blocks_of(p) for p in plans]
        calls = {i: self._calls(i) for i in numbers}
        # of each batch the distinct hidden states, and which of them each plan is at
        ways_in = sorted(set(before))
        states = {i: [self._entering(i, *bits) for bits in ways_in] for i in numbers}
        at = [ways_in.index(bits) for bits in before]
        for b in range(len(blocks[0]) if plans else 0):
            pairs = sorted({(block[b], place) for block, place in zip(blocks, at, strict=True)})
            new, module = {i: [] for i in numbers}, None
            for bits, group in ((c, [p for p in pairs if p[0] == c]) for c in sorted({c for c, _ in pairs})):
                module = None if bits == DROP else self.levels.block(b, bits)
                for _, place in group:
                    for i in numbers:
                        hidden = states[i][place]
                        new[i].append(hidden if module is None else _first(module(hidden, **calls[i][1][b])))
                self.ran += 0 if module is None else len(group) * len(numbers)
            at = [pairs.index((block[b], place)) for block, place in zip(blocks, at, strict=True)]
            states = new
        self.without_sharing += sum(c != DROP for block in blocks for c in block) * len(numbers)
        heads = [space.choice(p, self.space.head_site) for p in plans]
        return [(i, self._scored(i, states[i], at, heads)) for i in numbers]

    def _scored(self, number: int, states: list[torch.Tensor], at: list[int], heads: list[int]) -> np.ndarray:
        """Return the costs (plans, rows) of plans whose last hidden states are states[at], by their heads' bits."""
        batch, ids_logp = self.batches[number], self._reference(number)
        chosen, found = batch.labels != IGNORED, {}
        rows = batch.owner[:, 1:][:, batch.kept][chosen]
        for place, bits in set(zip(at, heads, strict=True)):
            each = divergence(*ids_logp, self._logits(number, states[place], bits)).cpu()
            sums = torch.zeros(len(batch.ids)).index_add(0, rows, each)
            found[place, bits] = (sums / rows.bincount(minlength=len(batch.ids))).numpy()
        return np.array([found[key] for key in zip(at, heads, strict=True)])

    def _logits(self, number: int, hidden: torch.Tensor, bits: int) -> torch.Tensor:
        """Return the logits (targets, vocab) where answers are predicted."""
        batch, inner = self.batches[number], parts(self.levels.model)
        hidden = hidden[:, batch.kept][(batch.labels != IGNORED).to(hidden.device)]
        head = next(iter(self._packed(self.space.head_site, bits).values()), inner.head)
        return head(inner.text_model.norm(hidden))

    def _packed(self, site: str, bits: int) -> dict:
        return self._kept((site, bits), partial(self.levels.linears, site, bits))

    def _reference(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `reference` of the original on a batch, run once."""
        if number not in self._references:
            hidden = self._entering(number, FULL, FULL)
            for b, kwargs in enumerate(self._calls(number)[1]):
                hidden = _first(self.levels.block(b, FULL)(hidden, **kwargs))
            self._references[number] = reference(self._logits(number, hidden, FULL), self.top)
        return self._references[number]

    def _calls(self, number: int) -> tuple[torch.Tensor, list[dict]]:
        """Return what the blocks are called with on a batch: the first one's hidden states, each one's arguments."""
        return self._kept(("calls", number), lambda: _calls(self.levels.model, self.batches[number]))

    def _entering(self, number: int, tower_bits: int, table_bits: int) -> torch.Tensor:
        """Return the hidden states (images, seq, hidden) that enter the first block, tower and table in these bits."""
        if tower_bits == table_bits == FULL:
            return self._calls(number)[0]
        packed = self._packed(TOWER, tower_bits) | self._packed(TABLE, table_bits)
        model, batch = self.levels.model, self.batches[number]

        def entering():
            whole = {name: model.get_submodule(name) for name in packed}
            for name, linear in packed.items():
                model.set_submodule(name, linear)
            try:
                return _calls(model, batch)[0]
            finally:
                for name, linear in whole.items():
                    model.set_submodule(name, linear)

        return self._kept(("entering", number, tower_bits, table_bits), entering)

    def _kept(self, key: tuple, make):
        if key not in self._inputs:
            self._inputs[key] = make()
        return self._inputs[key]


def _key(plan: Plan, batch: int) -> str:
    return f"{' '.join(map(str, plan))} on batch {batch}"


def _first(output):
    return output[0] if isinstance(output, tuple) else output


def _calls(model, batch: TeacherBatch) -> tuple[torch.Tensor, list[dict]]:
    """Return the hidden states that enter the first block and every block's other arguments; no block is run."""
    seen, blocks = [], parts(model).blocks

    def pass_by(hidden, **others):
        if seen and hidden is not seen[-1][0]:
            raise ValueError("the model adds to what its blocks pass on (deepstack), which the search does not follow.")
        seen.append((hidden, others))
        return hidden

    for block in blocks:
        block.forward = pass_by
    try:
        model.base_model(**{k: v.to(choose_device()) for k, v in batch.inputs.items()}, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return seen[0][0], [others for _, others in seen]


def cost_tables(space: Space, single: list[tuple[int, int]], costs: np.ndarray) -> list[dict[int, float]]:
    """Return {choice: cost} of each site from `Costs.single`'s costs (choices,), or (choices, rows) to be averaged."""
    means = costs if costs.ndim == 1 else costs.mean(1)
    tables = [{FULL: 0.0} for _ in space.sites]
    for (site, choice), mean in zip(single, means, strict=True):
        tables[site][choice] = float(mean)
    return tables


def resampled(costs: np.ndarray, images: list[str], draws: int, seed: int) -> list[np.ndarray]:
    """Return the costs (choices,) of draws of whole images with replacement, from costs (choices, rows).

    images: of each row, which its questions share.
    """
    names, which = np.unique(np.asarray(images), return_inverse=True)
    member = np.eye(len(names))[which]  # (rows, images)
    by_image = costs @ member / member.sum(0)
    picks = np.random.default_rng([seed, 17]).integers(len(names), size=(draws, len(names)))
    return [by_image[:, pick].mean(1) for pick in picks]
