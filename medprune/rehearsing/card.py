"""A pretend GPU: true shapes, true bytes, no memory and no arithmetic, to rehearse anywhere what a card would run.

A Python backend for torch's PrivateUse1 device, named `NAME`. Its tensors hold meta tensors; a ledger counts the
bytes of every live storage of each card and raises torch.OutOfMemoryError at the card's limit. An operation that mixes
devices raises, as on CUDA. Whole numbers and truth values that came from the host keep their values, so that masks,
positions and labels choose what they would choose; what is computed from weights has none: read back, a float is
`READ`, a truth value true, and whole numbers the tokens of a short answer.

Not in the ledger: the CUDA context, kernels' workspaces, and fragments of the allocator, for which `rehearsal` leaves
room. `start` patches torch for the rest of the process: call it before models are made.
"""

import contextlib
import functools
import itertools
import json
import threading
import weakref
from types import SimpleNamespace

import torch
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "npu"  # a name that accelerate takes to have half precision; nothing of such a device is here
READ = 0.25  # what a float that was never computed reads as: within the bounds of what is checked of losses and scores
SHADOW = 2**18  # entries up to which whole numbers keep their values; of floats a thousandth
aten = torch.ops.aten
SAID, END = 5, 2  # a token of an answer, and the end of sequence, of the models that are rehearsed
_tokens = itertools.cycle((SAID, SAID, END))  # what whole numbers read as: answers are two tokens long
_LIBRARIES = []  # kept alive: a registration ends with its Library


class Token:
    """Alive as long as a storage is, whose bytes it gives back."""

    def __init__(self, size: int, card: int):
        ledger.add(size, card)
        self.size, self.card = size, card

    def __del__(self):
        if hasattr(self, "size"):  # it fitted
            ledger.add(-self.size, self.card)


class Ledger:
    """Bytes held by each card, `now` and `peak`, and the `limit` of a card."""

    def __init__(self, cards: int, limit: int | None):
        self.limit, self.lock = limit, threading.RLock()  # a finalizer may run while its own thread counts
        self.devices = [torch.device(NAME, card) for card in range(cards)]
        self.now, self.peak, self.begun = [0] * cards, [0] * cards, [0] * cards
        self.held = weakref.WeakValueDictionary()  # address of a storage -> its token

    def token(self, elem: torch.Tensor, card: int):
        """Return what keeps a storage counted: every tensor that uses it holds the same one."""
        storage = elem.untyped_storage()
        address = storage._cdata
        with self.lock:
            token = self.held.get(address)
            if token is None:
                # rounded to the allocator's smallest step
                token = self.held[address] = Token(-(-storage.nbytes() // 512) * 512, card)
        return token

    def add(self, n: int, card: int) -> None:
        with self.lock:
            if self.limit and n > 0 and self.now[card] + n > self.limit:
                have = f"{self.now[card] / 2**30:.2f} of {self.limit / 2**30:.2f} GiB are taken"
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. (pretended) Tried to allocate {n / 2**30:.3f} GiB on card {card}: {have}."
                )
            self.now[card] += n
            self.peak[card] = max(self.peak[card], self.now[card])
            self.begun[card] = max(self.begun[card], self.now[card])


ledger: Ledger | None = None


class Storage:
    """What asks for a tensor's storage is told its size, and an address that no other has."""

    def __init__(self, elem: torch.Tensor):
        self._storage = elem.untyped_storage()
        self.device = torch.device(NAME)

    def data_ptr(self) -> int:
        return self._storage._cdata

    def nbytes(self) -> int:
        return self._storage.nbytes()

    size = nbytes


class Pretend(torch.Tensor):
    """A tensor on a pretend card: `elem` is its meta tensor, `truth` its values where they are known."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: torch.Tensor, card: int = 0, real: torch.Tensor | None = None, token=None):
        form = {"strides": elem.stride(), "storage_offset": elem.storage_offset(), "dtype": elem.dtype}
        made = cls._make_wrapper_subclass(cls, elem.shape, **form, device=ledger.devices[card])
        made.elem, made.truth, made.card, made.token = elem, real, card, token or ledger.token(elem, card)
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self):
        return f"Pretend({tuple(self.shape)}, {self.dtype}, {self.device})"

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        torch.Tensor.data.__set__(self, other)
        self.elem, self.truth, self.token = other.elem, other.truth, other.token

    def __reduce_ex__(self, protocol):
        return value(self.detach()).__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copied = self.detach().clone()
        return torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied

    def data_ptr(self):
        return self.elem.untyped_storage()._cdata + self.storage_offset() * self.element_size()

    def untyped_storage(self):
        return Storage(self.elem)

    def numpy(self, **_):
        return self.cpu().numpy()

    def tolist(self):
        return self.cpu().tolist()


COUNTS, FEW = (aten.sum.default, aten.sum.dim_IntList), 4096  # truths that are counted: a few pictures', no pixels'


def is_card(device) -> bool:
    return device is not None and torch.device(device).type == NAME


def _number(device) -> int:
    return torch.device(device).index or 0


def value(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the host with the values that reading it back gives."""
    if isinstance(tensor, Pretend):
        if tensor.truth is not None:
            return tensor.truth.clone()
        fill = True if tensor.dtype == torch.bool else READ if tensor.is_floating_point() else next(_tokens)
        return torch.full(tensor.shape, fill, dtype=tensor.dtype)
    return tensor


def _keeps(tensor) -> bool:
    """Say whether a tensor's values are carried along."""
    small = SHADOW if not (tensor.is_floating_point() or tensor.is_complex()) else SHADOW // 1024
    return tensor.numel() <= small


def run(func, args, kwargs):
    """Run one operation on meta tensors, and on the values as well where all of them are known."""
    if special := SPECIAL.get(func):
        return special(func, args, kwargs)
    device = kwargs.get("device")
    if device is not None and not is_card(device) and torch.device(device).type != "meta":
        return _on_host(func, args, kwargs)
    if (func.is_view or func is aten._unsafe_view.default) and isinstance(args[0], Pretend):
        return _view(func, args, kwargs)
    if func in BY_INDEX:
        args = (args[0], [number for index in args[1] for number in _as_numbers(index)], *args[2:])
    if func in COUNTS and args[0].dtype == torch.bool and args[0].truth is None and args[0].numel() <= FEW:
        args[0].truth = torch.ones(args[0].shape, dtype=torch.bool)  # as each reads by itself
    key, flat = _form(func, args, kwargs)
    ours = [x for x in flat if isinstance(x, Pretend)]
    known = torch.Tag.nondeterministic_seeded not in func.tags and all(x.truth is not None for x in ours)
    if key in _FORMS and not (known and flat):
        return _again(_FORMS[key], ours, ours[0].card if ours else _number(device))
    _check_devices(func, flat, ours)
    return _first(func, args, kwargs, key, ours, known)


def _first(func, args, kwargs, key, ours, known: bool):
    """Run an operation on tensors of forms that were not seen before, or whose values are known."""
    device = kwargs.get("device")
    card = ours[0].card if ours else _number(device)
    meta_kwargs = kwargs | ({"device": torch.device("meta")} if "device" in kwargs else {})
    keeps_flag = func is aten._amp_foreach_non_finite_check_and_unscale_.default  # found no infinity
    real = _real(func, args, kwargs) if known else None
    try:
        out = func(*pytree.tree_map(_meta, args), **pytree.tree_map(_meta, meta_kwargs))
    except NotImplementedError:
        if real is None:
            raise
        out = pytree.tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, real)
    outs, spec = pytree.tree_flatten(out)
    if key is not None and real is None and not keeps_flag and "out" not in kwargs:
        _remember(key, outs, spec, ours)
    reals = pytree.tree_leaves(real) if real is not None else [None] * len(outs)
    return pytree.tree_unflatten([_wrap(o, r, ours, card, keeps_flag) for o, r in zip(outs, reals, strict=True)], spec)


def _form(func, args, kwargs) -> tuple:
    """Return what decides the form of an operation's results, or None where that cannot be said, and its tensors."""
    form, flat = [func], []
    _add_form((args, tuple(kwargs.items())), form, flat)
    try:
        hash(form := tuple(form))
    except TypeError:
        form = None
    return form, flat


def _add_form(x, form: list, flat: list) -> None:
    if isinstance(x, list | tuple):
        form.append(len(x))
        for each in x:
            _add_form(each, form, flat)
    elif isinstance(x, torch.Tensor):
        flat.append(x)
        held, place = (x.elem, x.card) if isinstance(x, Pretend) else (x, x.device)
        form += (held.shape, held.stride(), held.dtype, place)
    else:
        form += (type(x), x)


_FORMS = {}  # of an operation: the forms of its results, in place of which number of its pretended tensors they are


def _remember(key, outs: list, spec, ours: list) -> None:
    """Keep the forms of results that are new tensors, or tensors that were given."""
    given, storages, forms = [id(x.elem) for x in ours], {x.elem.untyped_storage()._cdata for x in ours}, []
    for out in outs:
        if id(out) in given:
            forms.append(given.index(id(out)))
        elif isinstance(out, torch.Tensor):
            form, storage = (out.shape, out.stride(), out.dtype), out.untyped_storage()
            if storage._cdata in storages or storage.nbytes() != _anew(form).untyped_storage().nbytes():
                return
            storages.add(storage._cdata)
            forms.append(form)
        elif out is None:
            forms.append(None)
        else:
            return
    if torch.Tag.inplace_view not in key[0].tags:
        _FORMS[key] = forms, spec


def _anew(form) -> torch.Tensor:
    shape, stride, dtype = form
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _again(known, ours: list, card: int):
    """Return results of forms that are known."""
    forms, spec = known
    outs = [_result(form, ours, card) for form in forms]
    return outs[0] if spec.is_leaf() else pytree.tree_unflatten(outs, spec)


def _result(form, ours: list, card: int):
    if isinstance(form, int):
        ours[form].truth = None
        return ours[form]
    return None if form is None else Pretend(_anew(form), card)


def _view(func, args, kwargs):
    """Return views of one tensor, of its values too."""
    source, rest = args[0], args[1:]
    out = func(source.elem, *rest, **kwargs)
    real = None if source.truth is None else func(source.truth, *rest, **kwargs)
    if isinstance(out, torch.Tensor):
        return _viewed(source, out, real)
    return [_viewed(source, o, r) for o, r in zip(out, real or [None] * len(out), strict=True)]


def _viewed(source, out: torch.Tensor, real: torch.Tensor | None):
    return Pretend(out, source.card, real if real is not None and _keeps(real) else None, source.token)


def _wrap(out, real, ours, card: int, keeps_flag: bool):
    if not isinstance(out, torch.Tensor):
        return out
    for x in ours:
        if x.elem is out:  # in place
            if real is None and not keeps_flag:
                x.truth = None
            return x
    return Pretend(out, card, real if real is not None and _keeps(real) else None)


def _known(x) -> bool:
    return not isinstance(x, Pretend) or x.truth is not None


def _real(func, args, kwargs):
    """Return what an operation gives of known values; None where the host has no such operation."""

    def known(x):
        return x.truth if isinstance(x, Pretend) else x

    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if any(x.device.type == "meta" for x in tensors if not isinstance(x, Pretend)):
        return None
    host = kwargs | ({"device": torch.device("cpu")} if "device" in kwargs else {})
    if not tensors and not _small(func, args, kwargs):
        return None
    try:
        return func(*pytree.tree_map(known, args), **pytree.tree_map(known, host))
    except (NotImplementedError, RuntimeError):
        return None


def _small(func, args, kwargs) -> bool:
    """Say whether a factory makes so little that its values may be kept."""
    out = func(*args, **kwargs | {"device": torch.device("meta")})
    return all(_keeps(x) for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor))


def _meta(x):
    if isinstance(x, Pretend):
        return x.elem
    if isinstance(x, torch.Tensor) and x.device.type != "meta":
        return x.to("meta")
    return x


def _check_devices(func, flat, ours) -> None:
    """Raise as CUDA does where tensors lie on different devices; numbers and indices may lie on the host."""
    by_index = "index" in func.name() and "index_add" not in func.name() and "index_select" not in func.name()
    host = [x for x in flat if not isinstance(x, Pretend) and x.dim() and x.device.type != "meta"]
    if ours and host and not by_index:
        raise RuntimeError(f"{func.name()}: tensors on {ours[0].device} and on {host[0].device}.")
    if len({x.card for x in ours if x.dim()}) > 1:
        raise RuntimeError(f"{func.name()}: tensors on cards {sorted({x.card for x in ours})}.")


def _on_host(func, args, kwargs):
    return func(*pytree.tree_map(value, args), **kwargs)


def _number_of(func, args, kwargs):
    return value(args[0]).item()


def _equal(func, args, kwargs) -> bool:
    """Return whether known values are equal, or close; what is not known is taken to be."""
    return bool(func(*map(value, args[:2]), *args[2:], **kwargs)) if all(map(_known, args[:2])) else True


def _move(func, args, kwargs):
    source, device = args[0], kwargs.get("device")
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    here = source.device if device is None else torch.device(device)
    if here.type == "meta":
        return aten._to_copy.default(_meta(source), device=here, **kwargs)
    if not is_card(here):
        return aten._to_copy.default(value(source), device=here, **kwargs)
    card = _number(here) if here.index is not None or not isinstance(source, Pretend) else source.card
    known, real = source if not isinstance(source, Pretend) else source.truth, None
    if known is not None and known.device.type != "meta" and _keeps(known):
        real = aten._to_copy.default(known, **{k: v for k, v in kwargs.items() if k != "non_blocking"}).clone()
    return Pretend(aten._to_copy.default(_meta(source), device=torch.device("meta"), **kwargs), card, real)


def _copy(func, args, kwargs):
    target, source = args[:2]
    if not isinstance(target, Pretend):
        return target.copy_(value(source))
    known = source.truth if isinstance(source, Pretend) else source
    if target.truth is not None and known is not None and known.device.type != "meta":
        target.truth.copy_(known)
    else:
        target.truth = None
    return target


def _data_dependent(func, args, kwargs):
    """Return what depends on values; where they are not known, as if every entry were chosen."""
    flat = [x for x in args if isinstance(x, torch.Tensor)]
    ours = [x for x in flat if isinstance(x, Pretend)]
    _check_devices(func, flat, ours)
    found = func(*pytree.tree_map(value, args), **kwargs)
    return pytree.tree_map(lambda x: Pretend(x.to("meta"), ours[0].card, x if _keeps(x) else None), found)


def _as_numbers(index) -> tuple:
    """Return an index as meta tensors take it: of a mask the places that are true."""
    if not isinstance(index, torch.Tensor) or index.dtype not in (torch.bool, torch.uint8):
        return (index,)
    return value(index).nonzero(as_tuple=True)


BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
SPECIAL = {aten._to_copy.default: _move, aten.copy_.default: _copy}
SPECIAL |= dict.fromkeys((aten.equal.default, aten.allclose.default), _equal)
SPECIAL |= dict.fromkeys((aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default), _number_of)
SPECIAL |= dict.fromkeys((aten.nonzero.default, aten.masked_select.default, aten._unique2.default), _data_dependent)


def remembered(function, form):
    """Return a function that runs once for each form of its arguments, as `form` gives it from them.

    Later calls take the memory that the first one took on top of what was held, and give tensors of the same forms. For
    what computes tensors from tensors, changes nothing and keeps nothing, such as a layer that unpacks its weight.
    """
    seen = {}

    @functools.wraps(function)
    def found(*args):
        if not any(isinstance(x, Pretend) for x in args):
            return function(*args)
        key = form(*args)
        if key not in seen:
            before, peak = list(ledger.now), ledger.peak
            ledger.peak = list(before)
            try:
                out = function(*args)
            finally:
                rise = [high - low for high, low in zip(ledger.peak, before, strict=True)]
                ledger.peak = [max(pair) for pair in zip(ledger.peak, peak, strict=True)]
            seen[key] = rise, (out.shape, out.stride(), out.dtype), out.card
            return out
        rise, made, card = seen[key]
        for number, most in enumerate(rise):
            ledger.add(most, number)
            ledger.add(-most, number)
        return Pretend(_anew(made), card)

    return found


class _Cards(_DummyBackendModule):
    """What torch and its users ask of torch.gpu, as they would of torch.cuda, on a card of a T4's kind."""

    def is_available(self):
        return True

    def device_count(self):
        return len(ledger.now)

    def get_device_capability(self, device=None):
        return 7, 5

    def get_device_properties(self, device=None):
        return SimpleNamespace(name="pretended GPU", total_memory=ledger.limit or 2**50)

    def get_device_name(self, device=None):
        return "pretended GPU"

    def mem_get_info(self, device=None):
        total = ledger.limit or 2**50
        return total - ledger.now[_number(device or NAME)], total

    def memory_allocated(self, device=None):
        return ledger.now[_number(device or NAME)]

    def max_memory_allocated(self, device=None):
        return ledger.begun[_number(device or NAME)]

    def reset_peak_memory_stats(self, device=None):
        ledger.begun[_number(device or NAME)] = ledger.now[_number(device or NAME)]

    def is_bf16_supported(self, *_):
        return True  # emulated on a T4

    def get_amp_supported_dtype(self):
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device=None):
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state, device=None):
        """Nothing is drawn on a pretended card."""

    def is_autocast_enabled(self):
        return False

    def empty_cache(self):
        """The ledger counts what is alive: nothing lies idle."""

    def synchronize(self, device=None):
        """What is pretended is done at once."""

    def device(self, number):
        return contextlib.nullcontext()


def start(cards: int = 1, limit: int | None = None) -> Ledger:
    """Put `cards` pretended cards of `limit` bytes into this process; return their ledger."""
    global ledger
    if ledger is not None:
        raise RuntimeError("there are pretended cards in this process already.")
    torch.inference_mode = no_grad
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Cards())
    ledger = Ledger(cards, limit)
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    _LIBRARIES.append(library)
    torch.tensor = _made(torch.tensor)
    torch.Tensor.pin_memory = lambda tensor, device=None: tensor
    functional = torch.nn.functional
    functional.scaled_dot_product_attention = _attention(functional.scaled_dot_product_attention)
    _stand_in_for_nf4()
    _autocast()
    return ledger


def no_grad(mode=True):
    """Stand in for torch.inference_mode, which wrapper subclasses cannot be in: they have no version counter there."""
    return torch.no_grad()(mode) if callable(mode) else torch.no_grad() if mode else torch.enable_grad()


def _made(tensor):
    """Return torch.tensor that can make tensors of pretended cards: the dispatcher never sees it."""

    @functools.wraps(tensor)
    def made(data, *args, device=None, requires_grad=False, **kwargs):
        if not is_card(device):
            return tensor(data, *args, device=device, requires_grad=requires_grad, **kwargs)
        return tensor(data, *args, **kwargs).to(device).requires_grad_(requires_grad)

    return made


HALF = ["linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "conv2d", "einsum"]  # as autocast has them on CUDA
WHOLE = ["layer_norm", "softmax.int", "log_softmax.int", "cross_entropy_loss", "nll_loss", "mse_loss"]


def _autocast() -> None:
    """Let operations under torch.autocast take half or single precision as they do on CUDA."""
    import accelerate.accelerator

    accelerate.accelerator.get_grad_scaler = lambda *_, **how: torch.amp.GradScaler(NAME, **how)
    library, here = torch.library.Library("aten", "IMPL"), torch._C.DispatchKey.AutocastPrivateUse1
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    _LIBRARIES.extend((library, rest))
    keys = torch._C.DispatchKeySet(here)

    def register(name: str, half: bool) -> None:
        packet, _, overload = name.partition(".")
        op = getattr(getattr(aten, packet), overload or "default")

        def kernel(*args, **kwargs):
            dtype = torch.get_autocast_dtype(NAME) if half else torch.float32

            def cast(x):
                floating = isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
                return x.to(dtype) if floating else x

            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*pytree.tree_map(cast, args), **pytree.tree_map(cast, kwargs))

        library.impl(name, kernel, "AutocastPrivateUse1")

    for names, half in ((HALF, True), (WHOLE, False)):
        for name in names:
            register(name, half)


class _Efficient(torch.autograd.Function):
    """Attention as a GPU's memory-efficient kernel holds it: outputs and a sum a query, and never the scores."""

    @staticmethod
    def forward(ctx, query, key, value_):
        out = query.new_empty(*query.shape[:-1], value_.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value_, out, sums)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _attention(whole):
    @functools.wraps(whole)
    def attention(query, key, value, *args, **kwargs):
        if isinstance(query, Pretend):
            return _Efficient.apply(query, key, value)
        return whole(query, key, value, *args, **kwargs)

    return attention


def _stand_in_for_nf4() -> None:
    """Let bitsandbytes' 4-bit parameters, a Parameter subclass that cannot wrap a wrapper, be pretended tensors."""
    import bitsandbytes as bnb
    from bitsandbytes.functional import QuantState, quantize_4bit

    original = bnb.nn.Params4bit

    class Params4bit(original):
        def __new__(cls, data=None, requires_grad=False, **kinds):
            if not isinstance(data, Pretend):
                return original.__new__(original, data, requires_grad, **kinds)
            kinds = {"blocksize": 64, "compress_statistics": True, "quant_type": "fp4"} | kinds
            state = kinds.get("quant_state")
            if state is None and not kinds.get("bnb_quantized"):
                how = {k: kinds[k] for k in ("blocksize", "compress_statistics", "quant_type")}
                data, state = quantize_4bit(data.detach().contiguous(), **how)
            return _nf4_parameter(data, state, kinds)

        @classmethod
        def from_prequantized(cls, data, quantized_stats, device="cuda", module=None, **kinds):
            if not is_card(device):
                return original.from_prequantized(data, quantized_stats, device=device, module=module, **kinds)
            state = QuantState.from_dict(qs_dict=quantized_stats, device=device)
            names = {"blocksize": state.blocksize, "compress_statistics": state.nested, "quant_type": state.quant_type}
            return _nf4_parameter(data.to(device), state, names | {"module": module})

    def _nf4_parameter(data, state, kinds):
        held = NF4(data.elem, data.card)
        held._is_param, held.bnb_quantized, held.quant_state, held.quant_storage = True, True, state, torch.uint8
        for name in ("blocksize", "compress_statistics", "quant_type", "module"):
            setattr(held, name, kinds.get(name))
        if held.module is not None:
            held.module.quant_state = state
        return held

    bnb.nn.Params4bit = bnb.nn.modules.Params4bit = Params4bit


class NF4(Pretend):
    """A weight of bitsandbytes on a pretended card, packed already."""


NF4.__name__ = "Params4bit"  # what peft and accelerate look for


# ---- files that are as large as the real ones, and hold nothing
DTYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
WRITTEN = 2**20  # bytes of a tensor whose known values are written; larger ones, or unknown ones, are holes


def write_holes(tensors: dict[str, torch.Tensor], path, metadata: dict | None = None) -> None:
    """Write a safetensors file of the true size and names; large tensors, or such without values, are holes in it."""
    header, at, values = {"__metadata__": metadata} if metadata else {}, 0, []
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        if size <= WRITTEN and tensor.device.type != "meta":
            values.append((at, value(tensor.detach()).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()))
        at += size
    words = json.dumps(header).encode()
    words += b" " * (-len(words) % 8)
    with open(path, "wb") as file:
        file.write(len(words).to_bytes(8, "little") + words)
        for start, found in values:
            file.seek(8 + len(words) + start)
            file.write(found)
        file.truncate(8 + len(words) + at)
