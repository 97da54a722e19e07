"""Replace layers whose plain form would be wrong in a batch with padding or with a noise key.

Inside any module, ``with Substitutes(real, key): loss(...)`` replaces BatchNorm in training mode by
one that ignores padding. It replaces random draws (dropout, also between the levels of a recurrent
layer, stochastic depth, ``torch.rand`` and ``randn``) by functions of ``key``. The engine enters it
only if a batch needs it (see ``Model.training_context``); otherwise the plain layers run.
"""

from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..core.seeds import uniform

_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
# The value says whether the shape is that of the first argument.
_UNIFORM = {torch.rand: False, torch.rand_like: True}
_NORMAL = {torch.randn: False, torch.randn_like: True}
_DROPOUTS = {F.dropout: 0, F.dropout1d: 1, F.dropout2d: 2, F.dropout3d: 3}

# The function of nn.MultiheadAttention without its check has_torch_function, which would call the
# mode again without end.
_torch_multi_head = F.multi_head_attention_forward
_multi_head = FunctionType(
    _torch_multi_head.__code__,
    {**_torch_multi_head.__globals__, "has_torch_function": lambda tensors: False},
    argdefs=_torch_multi_head.__defaults__,
)


class Substitutes(TorchFunctionMode):
    """Intercepts torch functions in one client's forward pass.

    real: [B], False for padding, or None; key: [] int64. The draws of a pass are numbered, so two
    dropout layers get different noise.
    """

    def __init__(self, real: Tensor | None, key: Tensor) -> None:
        super().__init__()
        self._real, self._key, self._draws = real, key, 0
        self.met_batch_norm = self.met_noise = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        if func in _DROPOUTS:
            return self._dropout(_DROPOUTS[func], *args, **kwargs)
        if func is torch.Tensor.bernoulli_:
            return self._bernoulli(*args, **kwargs)
        if func in _RECURRENT:
            return self._recurrent(func, *args, **kwargs)
        if func in _UNIFORM or func in _NORMAL:
            return self._draw(func, *args, **kwargs)
        if func is F.gumbel_softmax:
            return self._gumbel_softmax(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:  # torch disables the mode inside this method; its inner calls need it again
                return _multi_head(*args, **kwargs)
        return func(*args, **kwargs)

    def _uniform(self, shape: tuple[int, ...]) -> Tensor:
        self.met_noise = True
        self._draws += 1
        step = self._draws * 0x5851F42D4C957F2D % 2**63  # torch refuses numbers above int64
        return uniform(self._key + step, tuple(shape))

    def _bernoulli(self, x: Tensor, p: float = 0.5, generator=None) -> Tensor:
        return (self._uniform(x.shape) < p).to(x.dtype)

    def _dropout(
        self, spatial: int, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ):
        if not training or p == 0.0:
            return x
        keep_mask = self._uniform(x.shape[: x.dim() - spatial]) >= p
        # for p = 1 nothing is kept; max avoids 0 / 0
        return x * keep_mask.view(*keep_mask.shape, *[1] * spatial) / max(1 - p, 2**-24)

    def _draw(self, func, *args, generator=None, **kwargs):
        """Return uniform or normal numbers from the run's key instead of a global generator."""
        takes_template = (_UNIFORM | _NORMAL)[func]
        if generator is not None:  # the network's own generator, which purity.py reports
            return func(*args, generator=generator, **kwargs)
        template = (
            torch.empty_like(*args, **kwargs) if takes_template else torch.empty(*args, **kwargs)
        )
        numbers = self._uniform(template.shape)
        if func in _NORMAL:  # Box and Muller 1958
            numbers = (-2 * torch.log1p(-numbers)).sqrt() * torch.cos(
                2 * torch.pi * self._uniform(template.shape)
            )
        return numbers.to(template.device, template.dtype)

    def _gumbel_softmax(self, logits, tau=1.0, hard=False, eps=1e-10, dim=-1):
        """Return torch's gumbel_softmax with keyed noise.

        With ``hard`` the sample is one-hot and has the gradient of the soft sample.
        """
        noise = -(-torch.log1p(-self._uniform(logits.shape))).clamp(min=2**-24).log()
        soft = ((logits + noise.to(logits.dtype)) / tau).softmax(dim)
        if not hard:
            return soft
        one_hot = torch.zeros_like(logits).scatter(dim, soft.max(dim, keepdim=True)[1], 1.0)
        return one_hot - soft.detach() + soft

    def _recurrent(self, func, *args):
        """Run the levels of a recurrent layer one by one, with keyed dropout between them."""
        # packed: data, batch_sizes, hx, weights, ...; else: input, hx, weights, ...
        packed = isinstance(args[3], list | tuple)
        leading, trailing = args[: 1 + packed], args[8 + packed :]
        hx, weights, biases, levels, dropout, train, bidirectional = args[1 + packed : 8 + packed]
        if not (train and dropout and levels > 1):
            return func(*args)
        x, *sizes = leading
        directions, weights_per_level, final_states = 1 + bidirectional, len(weights) // levels, []
        for level in range(levels):
            level_slice = slice(level * directions, (level + 1) * directions)
            initial_state = (
                [h[level_slice] for h in hx] if isinstance(hx, list | tuple) else hx[level_slice]
            )
            level_weights = weights[level * weights_per_level : (level + 1) * weights_per_level]
            x, *final_state = func(
                x,
                *sizes,
                initial_state,
                level_weights,
                biases,
                1,
                0.0,
                train,
                bidirectional,
                *trailing,
            )
            final_states.append(final_state)
            if level + 1 < levels:
                x = self._dropout(0, x, dropout)
        return x, *(torch.cat(halves) for halves in zip(*final_states, strict=True))

    def _attention(
        self,
        query,
        key,
        value,
        attn_mask=None,
        dropout_p=0.0,
        is_causal=False,
        scale=None,
        **options,
    ):
        """Return softmax(Q K^T s + mask) V with keyed dropout on the attention weights."""
        if dropout_p == 0.0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, **options
            )
        scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
        if is_causal:
            scores = scores.masked_fill(
                scores.new_ones(scores.shape[-2:]).triu(1).bool(), float("-inf")
            )
        if attn_mask is not None:
            is_boolean = attn_mask.dtype == torch.bool
            scores = (
                scores.masked_fill(~attn_mask, float("-inf")) if is_boolean else scores + attn_mask
            )
        return self._dropout(0, scores.softmax(-1), dropout_p) @ value

    def _batch_norm(
        self,
        x,
        running_mean,
        running_var,
        weight=None,
        bias=None,
        training=False,
        momentum=0.1,
        eps=1e-5,
    ) -> Tensor:
        """Return BatchNorm of x [B, channels, ...] with statistics of its real examples alone.

        x may have k B rows: the k of an example are in a row, and all real or none.
        A batch with one value per channel has no variance. It is normalised to zero and does not
        change ``running_var``; torch would raise an error.
        """
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        self.met_batch_norm = True
        original, x = x, x.float() if x.dtype.itemsize < 4 else x  # bfloat16 sums are inaccurate
        real = (
            torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
            if self._real is None
            else self._real[:, None].expand(-1, x.shape[0] // len(self._real)).flatten()
        )
        dims = [0, *range(2, x.dim())]
        channel_shape = [1, -1] + [1] * (x.dim() - 2)
        counts = real.to(x.dtype).view(-1, *[1] * (x.dim() - 1))  # [B, 1, ...]
        total = counts.sum() * x[0, 0].numel()
        mean = (x * counts).sum(dims) / total
        centred = x - mean.view(channel_shape)
        var = (centred.square() * counts).sum(dims) / total
        if running_mean is not None:
            with torch.no_grad():
                unbiased = var * total / (total - 1).clamp(min=1)
                running_mean += momentum * (mean - running_mean)
                running_var += momentum * torch.where(total > 1, unbiased - running_var, 0)
        y = centred * (var + eps).rsqrt().view(channel_shape)
        if weight is not None:
            y = y * weight.view(channel_shape) + bias.view(channel_shape)
        return y.to(original.dtype)
