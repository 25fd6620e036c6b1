"""Test device `foreign`, which computes on the CPU but, like CUDA, rejects operations that mix devices.

Operations that CUDA rejects ("expected all tensors to be on the same device") raise an error. Operations that make the
host wait for a CUDA device are counted. Half precision, streams and speed are not modelled. PyTorch allows one such
device per process, and `--device auto` would choose it, so the device runs in a separate process:

    echo '["pretrain", "--device", "foreign", "--dry-run"]' | python tests/foreign.py

Each line on standard input is a script's name and flags. The reply is a line with its error, output and waits.
"""

import contextlib
import functools
import importlib
import io
import json
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME, ROOT = "foreign", Path(__file__).resolve().parent.parent
WAITS: Counter[str] = Counter()  # of the host for the device, by function of the project


class Backend(backend_registration._DummyBackendModule):
    """The module `torch.foreign`: one device, whose random generator is the CPU's."""

    def manual_seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class Foreign(torch.Tensor):
    """A tensor on the device; `raw` is the CPU tensor of its values."""

    @staticmethod
    def __new__(cls, raw: torch.Tensor, requires_grad: bool = False) -> "Foreign":
        layout = dict(strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype)
        device = torch.device(NAME, 0)
        self = cls._make_wrapper_subclass(cls, raw.shape, **layout, device=device, requires_grad=requires_grad)
        self.raw = raw
        return self

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol: int) -> tuple:
        arguments = self.raw, self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, arguments  # as torch saves a device's tensors

    def __deepcopy__(self, memo: dict) -> "Foreign":
        copy = Foreign(self.raw.clone(), self.requires_grad)
        return torch.nn.Parameter(copy, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copy

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        """Run an operation if CUDA would run it; count it if CUDA would make the host wait."""
        kwargs, name = dict(kwargs or {}), op.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cpu = [x for x in tensors if not isinstance(x, Foreign)]
        is_copy, is_index = name in ("copy_", "_to_copy"), name in ("index", "index_put", "index_put_")

        # CUDA takes single numbers from the CPU, except to concatenate them, and indices of its own tensors.
        indices = tree_leaves(args[1]) if is_index and isinstance(args[0], Foreign) else []
        numbers = [] if name in ("cat", "stack") else [x for x in on_cpu if not x.dim()]
        allowed = {id(x) for x in (tensors if is_copy else [*indices, *numbers])}
        strangers = [tuple(x.shape) for x in on_cpu if id(x) not in allowed]
        if strangers:
            raise RuntimeError(f"{op}: tensors on {NAME} and, of shapes {strangers}, on the CPU")

        # The host waits for values that it reads, for shapes that depend on values, and for copies unless told not to.
        target = torch.device(kwargs.get("device") or (args[0].device if is_copy else NAME))
        if is_copy:
            crosses = {x.device.type for x in tensors} | {target.type} != {NAME}
            waits = crosses and (target.type == "cpu" or not (kwargs.get("non_blocking") or True in args[2:]))
        elif is_index:
            waits = bool(on_cpu) or any(x.dtype == torch.bool for x in indices if x is not None)
        else:
            waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags)
        if waits:
            WAITS[place()] += 1

        if target.type == NAME and "device" in kwargs:
            kwargs["device"] = "cpu"
        out = op(*tree_map(raw_of, args), **tree_map(raw_of, kwargs))
        wrappers = {id(raw_of(x)): x for x in tensors}  # an in-place operation returns its input
        return tree_map(lambda x: wrap(x, wrappers), out) if target.type == NAME else out


def raw_of(x: Any) -> Any:
    """Return the values of a foreign tensor, or any other object unchanged."""
    return x.raw if isinstance(x, Foreign) else x


def wrap(x: Any, wrappers: dict[int, torch.Tensor]) -> Any:
    """Return the tensor on the device with these values: one of `wrappers` or a new one."""
    if isinstance(x, torch.Tensor):
        return wrappers[id(x)] if id(x) in wrappers else Foreign(x)
    return x


def place() -> str:
    """Return the innermost running function of the project, such as `pretrain.main`."""
    frame = sys._getframe(1)
    while frame and not is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}" if frame else "backward"


@functools.cache
def is_ours(file: str) -> bool:
    return Path(file).parent in (ROOT, ROOT / "util")


def empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return Foreign(torch.empty(size, dtype=dtype or torch.get_default_dtype()))


def empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return Foreign(torch.empty_strided(size, stride, dtype=dtype or torch.get_default_dtype()))


def copy_from(source, target, non_blocking=False):
    """Copy a tensor, as `torch.tensor(numbers, device=...)` requests."""
    WAITS[place()] += not non_blocking
    raw_of(target).copy_(raw_of(source))
    return target


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    library = torch.library.Library("aten", "IMPL", "PrivateUse1")
    library.impl("empty.memory_format", empty)
    library.impl("empty_strided", empty_strided)
    library.impl("_copy_from", copy_from)
    torch.accelerator.synchronize = lambda device=None, /: None  # of a backend in Python PyTorch rejects it
    sys.path.insert(0, str(ROOT))
    for line in sys.stdin:
        script, *words = json.loads(line)
        WAITS.clear()
        with contextlib.redirect_stdout(io.StringIO()) as text:
            try:
                importlib.import_module(script).main(words)
                error = None
            except (Exception, SystemExit):
                error = traceback.format_exc()
        print(json.dumps(dict(error=error, text=text.getvalue(), waits=WAITS)), flush=True)


if __name__ == "__main__":
    main()
