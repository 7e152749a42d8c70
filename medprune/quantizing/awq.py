"""AWQ by autoawq 0.2.9 on a LLaVA of transformers 5, calibrated on images and text (arXiv:2306.00978, section 3.2).

autoawq walks the blocks, searches scales and clips, and folds them into the model; here are only the parts of it that
this transformers or a CPU breaks. What comes out are `PackedLinear` layers with AWQ's own integers.
"""

import warnings
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import torch
from torch import Tensor, nn

from medprune.models.families import parts
from medprune.progress import progress
from medprune.quantizing.packed import PackedLinear

with warnings.catch_warnings(record=True):  # awq announces its deprecation, and turns such warnings on for everyone
    from awq.models.llava import LlavaAWQForCausalLM
    from awq.quantize import quantizer as autoawq
    from awq.quantize.quantizer import AwqQuantizer
    from awq.utils.module import get_op_name

N_GRID = 20  # ratios 0, 0.05 ... 0.95 that autoawq tries: alpha of the paper's equation 5


def _bar(numbers, desc):
    with progress(len(numbers), desc, "block") as shown:
        for number in numbers:
            yield number
            shown.update()


autoawq.tqdm = _bar  # over the blocks: its own would print where it likes


class _Captured(Exception):
    pass


@contextmanager
def _on_differences(module: nn.Module):
    """Let the Linears of a module run on the difference to their first call, W x = W0 x0 + (W - W0) x0 + W (x - x0).

    The first call is in float32; the others multiply the differences alone, in bfloat16, whose rounding is then small
    beside what the search compares, and which takes a third of the time on CPU.
    """

    def forward(linear, first, x):
        if not first:
            y = nn.functional.linear(x, linear.weight, linear.bias)
            first.update(x=x, y=y, weight=linear.weight.detach().clone(), rounded=x.bfloat16())
        y = first["y"]
        if not torch.equal(linear.weight, first["weight"]):
            y = y + first["rounded"] @ (linear.weight - first["weight"]).bfloat16().t()
        if not torch.equal(x, first["x"]):
            y = y + (x - first["x"]).bfloat16() @ linear.weight.bfloat16().t()
        return y

    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in linears:
        layer.forward = partial(forward, layer, {})
    yield
    for layer in linears:
        del layer.forward


class _Llava(LlavaAWQForCausalLM):
    """Where autoawq finds the blocks, and what is scaled with what; never instantiated, as its methods are static."""

    model_type = "llava"

    @staticmethod
    def get_model_layers(model):
        return parts(model).blocks

    @staticmethod
    def move_embed(model, device):
        text_model = parts(model).text_model
        text_model.embed_tokens.to(device)
        text_model.rotary_emb.to(device)


class _Quantizer(AwqQuantizer):
    """autoawq's quantizer with a processor batch as `calib_data`; each block is searched in float32, one at a time."""

    def init_quant(self, n_samples=None, max_seq_len=None):
        """Run the whole model on the batch up to the first block; return (blocks, that block's kwargs, its input)."""
        blocks = self.awq_model.get_model_layers(self.model)
        self.dtype, self.loss_curves, self._name = next(blocks.parameters()).dtype, {}, ""
        caught = {}

        def catch(module, args, kwargs):
            caught.update(hidden=args[0], kwargs=kwargs)
            raise _Captured

        inputs = {k: v.to(self.model.device) for k, v in self.calib_data.items()}
        with blocks[0].register_forward_pre_hook(catch, with_kwargs=True), torch.no_grad(), suppress(_Captured):
            self.model(**inputs, use_cache=False)
        kwargs = caught["kwargs"]
        kwargs["position_embeddings"] = tuple(t.float() for t in kwargs["position_embeddings"])
        return blocks, kwargs, caught["hidden"].float()

    def pseudo_quantize_tensor(self, w: Tensor):
        """Return (rounded, scales, zero points) by autoawq's arithmetic, without its slow checks for NaN."""
        grouped = w.reshape(-1, self.group_size)
        low, high = grouped.amin(1, keepdim=True), grouped.amax(1, keepdim=True)  # aminmax takes four times as long
        scales = (high - low).clamp_(min=1e-5) / 15
        zeros = (low / scales).round_().neg_().clamp_(0, 15)
        rounded = (grouped / scales).round_().add_(zeros).clamp_(0, 15).sub_(zeros).mul_(scales)
        return rounded.view_as(w), scales.view(len(w), -1), zeros.view(len(w), -1)

    def _get_input_feat(self, layer, named_linears):
        layer.float()  # whole products in bf16 now and then choose an alpha of twice the loss
        return super()._get_input_feat(layer, named_linears)

    def _search_best_scale(self, module, prev_op, layers, inp, module2inspect=None, kwargs=None):
        self._name = get_op_name(self.model, layers[0])
        self.loss_curves[self._name] = []
        inspected = layers[0] if module2inspect is None else module2inspect
        x = inp.reshape(-1, inp.shape[-1])
        # Where a single Linear is inspected and there are more tokens than inputs, ||D X||^2 = tr(D G D^T), G = X^T X.
        self._gram = x.T @ x / len(x) if isinstance(inspected, nn.Linear) and len(x) > x.shape[1] else None
        fast = self._gram is None and x.device.type == "cpu" and self.dtype != torch.float32
        # autoawq puts the weights back from v.cpu(), which on a CPU is the very tensor that it scales in place.
        copies = inspected.register_state_dict_post_hook(
            lambda module, state, prefix, meta: state.update({k: v.clone() for k, v in state.items()})
        )
        with copies, _on_differences(inspected) if fast else nullcontext():
            return super()._search_best_scale(module, prev_op, layers, inp, module2inspect, kwargs or {})

    def _module_forward(self, x, module, module_kwargs):
        if isinstance(module, nn.Linear) and self._gram is not None:
            return module.weight.detach().clone()  # `_compute_loss` needs no more than the weight
        return super()._module_forward(x, module, module_kwargs)

    def _compute_loss(self, fp16_output, int_w_output, device):
        if self._gram is None:
            loss = super()._compute_loss(fp16_output, int_w_output, device)
        else:
            d = int_w_output - fp16_output
            loss = float(((d @ self._gram.to(d.device)) * d).sum() / len(d))
        self.loss_curves[self._name].append(loss)
        return loss

    @torch.no_grad()
    def _compute_best_clip(self, w: Tensor, input_feat: Tensor, n_grid=20, max_shrink=0.5, n_sample_token=512):
        """Return the clips (out, groups, 1): autoawq's objective, through the Gram matrix of each group's inputs.

        mean_t((q - w) x_t)^2 = (q - w) G (q - w)^T with G = X^T X / T, so no (out, tokens, in) tensor is made.
        """
        x = input_feat.reshape(-1, input_feat.shape[-1])
        x = x[:: max(1, len(x) // n_sample_token)]
        x = x.reshape(len(x), -1, self.group_size).float().to(w.device)  # (tokens, groups, group_size)
        gram = torch.einsum("tgk,tgl->gkl", x, x) / len(x)
        grouped = w.reshape(len(w), -1, self.group_size)
        largest = grouped.abs().amax(-1, keepdim=True)
        best, least = largest.clone(), torch.full_like(largest, float("inf"))
        for step in range(int(max_shrink * n_grid)):
            clip = largest * (1 - step / n_grid)
            clipped = torch.clamp(grouped, -clip, clip).reshape(w.shape)
            d = self.pseudo_quantize_tensor(clipped)[0].view_as(grouped) - grouped
            error = (torch.einsum("cgk,gkl->cgl", d, gram) * d).sum(-1, keepdim=True)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, clip, best)
        return best

    @torch.no_grad()
    def _apply_quant(self, module, named_linears):
        """Pack each Linear; autoawq's own packing loops over columns, and its layer cannot run on a CPU."""
        for name, linear in named_linears.items():
            module.set_submodule(name, PackedLinear.from_codes(*self.integers(linear), 4, linear.bias))
        module.to(self.dtype)

    def integers(self, linear: nn.Linear) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes, scale and zero_point as `PackedLinear` has them, by autoawq's arithmetic in fp16."""
        rounded, scale, zero_point = self.pseudo_quantize_tensor(linear.weight.detach().half())
        grouped = rounded.view(*scale.shape, -1)  # (out, groups, group_size)
        codes = ((grouped + (zero_point * scale)[..., None]) / scale[..., None]).round().view_as(rounded)
        return codes.to(torch.uint8), scale.t().contiguous(), zero_point.t().contiguous().to(torch.uint8)


@torch.no_grad()
def quantize_awq(model, batch: dict[str, Tensor], group_size: int) -> dict:
    """Search, fold and pack every block of `model` in place; return {"loss_curve", "calibration": what it was, said}.

    `batch` is a processor batch of equal, unpadded rows: input_ids (rows, tokens) and, for image-text calibration,
    pixel_values. The curve holds `ratios`, the alphas tried, and `losses`, a list for the first Linear of each group
    that shares a scale, by its full name: the mean squared error of the inspected output (equation 4; lower is better).
    """
    batch, device = {k: v for k, v in batch.items() if k != "attention_mask"}, model.device
    kind, (rows, tokens) = "image-text" if "pixel_values" in batch else "text-only", batch["input_ids"].shape
    quantizer = _Quantizer(_Llava, model, None, 4, group_size, True, "gemm", batch, None, None, duo_scaling=True)
    quantizer.quantize()
    model.to(device)
    curve = {"ratios": [i / N_GRID for i in range(N_GRID)], "losses": quantizer.loss_curves}
    return {"loss_curve": curve, "calibration": f"{kind}, {rows} rows of {tokens} tokens"}
