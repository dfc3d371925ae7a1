"""The loss of a student that is trained on labels and on a teacher's probabilities."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError


def check_distillation(alpha: float, temperature: float) -> None:
    """Refuse an alpha outside [0, 1] and a temperature that is not above 0."""
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"`alpha` must lie in [0, 1]; found {alpha}.")
    if not 0.0 < temperature < float("inf"):
        raise InputError(f"`temperature` must be a number above 0; found {temperature}.")


def distillation_loss(
    logits: Tensor,
    label: Tensor,
    teacher_log_probability: Tensor | None,
    *,
    alpha: float,
    temperature: float,
    weight: Tensor | None = None,
) -> Tensor:
    """(1 - a) CE(z, y) + a t² KL(softmax(z_t / t) || softmax(z / t)), mean over the rows.

    The form of Hinton et al. 2015 (arXiv:1503.02531), with the convex mixture of Ben-Baruch
    et al. 2024 (arXiv:2403.07854); whether that paper scales by t² could not be verified. t²
    keeps the gradient's size, and so the meaning of alpha, when t changes.

    Parameters
    ----------
    logits
        (N, C) of the student.
    label
        (N,) int64; not looked at where alpha is 1.
    teacher_log_probability
        (N, C) natural logs at temperature 1; log probabilities are logits up to a constant,
        so tempering them is tempering the teacher. None is allowed where alpha is 0.
    alpha
        Share of the teacher's term, 0 to 1.
    temperature
        t > 0.
    weight
        (N,) that each row's loss is multiplied by; the mean stays over N rows.

    Returns
    -------
    Scalar, nats. Raises InputError where alpha, the temperature or the teacher do not fit.
    """
    check_distillation(alpha, temperature)
    if alpha > 0 and teacher_log_probability is None:
        raise InputError(f"alpha {alpha} needs a teacher's log probabilities; found none.")
    loss = logits.new_zeros(len(logits))
    if alpha < 1:
        loss = loss + (1.0 - alpha) * F.cross_entropy(logits, label, reduction="none")
    if alpha > 0 and teacher_log_probability is not None:
        teacher = F.log_softmax(teacher_log_probability / temperature, dim=1)
        student = F.log_softmax(logits / temperature, dim=1)
        divergence = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=1)
        loss = loss + alpha * temperature**2 * divergence
    return (loss if weight is None else loss * weight).mean()
