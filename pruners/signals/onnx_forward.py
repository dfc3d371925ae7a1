"""ONNX Runtime as the forward pass of a Provence network: CPU, float32 weights."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from ...errors import ModelError
from ..contract import Array, FloatArray


class OnnxForward:
    """An exported network as a `Forward` (`signals.context`)."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = {given.name for given in session.get_inputs()}

    def __call__(self, ids: Array, mask: Array, types: Array) -> tuple[FloatArray, FloatArray]:
        """Run one batch of (B, T) int64 arrays: ranking logits (B,), keep logits (B, T)."""
        feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        made = self._session.run(
            ["rank_logit", "keep_logit"],
            {name: array for name, array in feed.items() if name in self._names},
        )
        return np.asarray(made[0], np.float32), np.asarray(made[1], np.float32)


def onnx_forward(loaded: Any, *, threads: int = 0) -> OnnxForward:
    """Export a loaded float32 network in memory and open it; nothing is written to disk.

    `threads` 0 takes torch's number of threads.

    Raises
    ------
    ModelError
        The extra `onnx` is not installed, or the encoder cannot be exported.
    """
    try:
        import onnx  # noqa: F401  the exporter needs it
        import onnxruntime
    except ImportError as error:
        raise ModelError(
            "backend onnx needs onnx and onnxruntime. Install them: pip install 'prunery[onnx]'."
        ) from error
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.inter_op_num_threads = 1
    try:
        model = export(loaded)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except (RuntimeError, ValueError, onnxruntime.capi.onnxruntime_pybind11_state.Fail) as error:
        raise ModelError(
            f"this encoder cannot be run by ONNX Runtime ({error}). Use backend='torch'."
        ) from error
    return OnnxForward(session)


def export(loaded: Any) -> bytes:
    """A loaded network as an ONNX file in memory, with free batch and length."""
    import torch

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = loaded.model

        def forward(self, ids: Any, mask: Any, types: Any) -> tuple[Any, Any]:
            out = self.network(ids, mask, types)
            return out.rank_logit, out.keep_logit

    ids = torch.arange(10, 26).reshape(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    names = ["input_ids", "attention_mask", "token_type_ids"]
    buffer = io.BytesIO()
    with torch.inference_mode(), warnings.catch_warnings():
        # Tracing warns of branches on shapes; that they hold is what the tests check.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Plain().eval(),
            (ids, mask, torch.zeros_like(ids)),
            buffer,  # type: ignore[arg-type]  # the older exporter writes to a stream
            input_names=names,
            output_names=["rank_logit", "keep_logit"],
            dynamic_axes={
                **{name: {0: "batch", 1: "length"} for name in names},
                "rank_logit": {0: "batch"},
                "keep_logit": {0: "batch", 1: "length"},
            },
            opset_version=17,
            dynamo=False,
        )
    return buffer.getvalue()
