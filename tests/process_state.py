"""The settings of torch and of Python that hold for the whole process."""

import sys

import torch
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, is_in_torch_dispatch_mode


def process_state():
    """Returns what neither a call of the library nor a test may leave changed, because all later code would meet it."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return {
        "gradients": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads of torch": torch.get_num_threads(),
        "products": [_precision(each) for each in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)],
        "fast attention": torch.backends.mha.get_fastpath_enabled(),
        "stance of torch.compile": dynamo._stance.stance if dynamo else "default",
        "torch function": torch._C._is_torch_function_enabled(),
        "function modes": _get_current_function_mode_stack(),
        "dispatch modes": _get_current_dispatch_mode_stack(),
        "a dispatch mode is on": is_in_torch_dispatch_mode(),
        "trace function": sys.gettrace(),
    }


def _precision(products):
    return "ieee" if products.fp32_precision == "none" else products.fp32_precision  # both are full fp32
