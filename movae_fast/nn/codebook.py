"""Hold and update a codebook: initialisation by k-means, moving averages, replacement of unused codes.

Nothing here reads a device value on the host, so that a training step can be captured in a CUDA graph.
Decisions that depend on the data (which codes are unused, how many rows are masked) are made with torch.where.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from movae_fast import ops

COSINE_EPS = 1e-6


def unit(x: Tensor) -> Tensor:
    """Scale the vectors of x, [N, D] or [B, D, ...], to length one. A vector shorter than 1e-6 is divided by
    1e-6 instead."""
    return F.normalize(x, dim=1, eps=COSINE_EPS)


def as_rows(z: Tensor) -> Tensor:
    """Reshape z [B, D, ...] to one vector per row, [N, D]; this copies, so it is used only to draw or mask
    rows."""
    return z if z.ndim == 2 else z.movedim(1, -1).reshape(-1, z.shape[1])


@torch.library.custom_op("movae::snapshot", mutates_args=())
def snapshot(codes: Tensor) -> Tensor:
    """Copy the codes, as an op that torch.compile cannot remove.

    Inductor removes a plain clone, and then the backward pass of a compiled step would read the updated codes.
    """
    return codes.clone()


@snapshot.register_fake
def _snapshot_fake(codes: Tensor) -> Tensor:
    return torch.empty_like(codes)


snapshot.register_autograd(lambda _ctx, grad: grad)


def code_statistics(z: Tensor, index: Tensor, n_codes: int, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the counts [K] and sums [K, D] of the vectors z, [N, D] or [B, D, ...], by their `index`, without
    masked ones.

    `mask` has the shape of the index and is true for vectors that count.
    """
    z, index, mask = as_rows(z), index.flatten(), mask.flatten()
    weight = mask.to(z.dtype)
    count = z.new_zeros(n_codes).index_add_(0, index, weight)
    kept = torch.where(mask[:, None], z, 0)  # a product would carry a masked row's NaN on
    return count, z.new_zeros(n_codes, z.shape[1]).index_add_(0, index, kept)


class Codebook(nn.Module):
    """Hold K codes of dimension D and their exponential moving averages.

    Buffers have the names and shapes of vector-quantize-pytorch's, so that checkpoints load both ways: embed
    [1, K, D], embed_avg [1, K, D] (moving sum of the rows of each code), cluster_size [1, K], initted [].
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        decay: float,
        eps: float,
        kmeans_init: bool,
        kmeans_iters: int,
        threshold_ema_dead_code: float,
        use_cosine_sim: bool,
        learnable: bool,
        ema_update: bool,
        sync: bool | None,
    ) -> None:
        super().__init__()
        self.decay, self.eps = decay, eps
        self.kmeans_iters = kmeans_iters
        self.threshold = threshold_ema_dead_code
        self.use_cosine_sim, self.ema_update, self.sync = use_cosine_sim, ema_update, sync
        embed = torch.zeros(1, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = unit(embed[0])[None] if use_cosine_sim else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(1, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # What the host knows of `initted`: asking the device at every step whether the first one is over would
        # stall it, and running k-means under a torch.where would cost ten lookups per step for ever. The buffer
        # may say more: it is copied without the host's knowledge when weights are averaged.
        self._ready = not kmeans_init

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "initted" in state_dict:
            self._ready = bool(state_dict[prefix + "initted"])

    @property
    def follows_batches(self) -> bool:
        """Return whether `update` changes anything: whether there are moving averages or a replacement of
        unused codes."""
        return self.ema_update or self.threshold > 0

    @property
    def _distributed(self) -> bool:
        if self.sync is False or not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size() > 1

    @torch.no_grad()
    def initialise(self, z: Tensor, mask: Tensor | None) -> None:
        """Initialise the codes by k-means on the first training batch z, [N, D] or [B, D, ...], that has a row;
        later calls do nothing.

        With a mask the host asks the device, once, whether a row was kept; without one nothing is read.
        """
        if self._ready:
            return
        z, mask = as_rows(z), None if mask is None else mask.flatten()
        n_codes = self.embed.shape[1]
        candidates, valid = self._candidates(z, mask).split([z.shape[1], 1], dim=1)
        if self._distributed:
            packed = torch.cat([candidates, valid], 1)
            dist.all_reduce(packed)
            candidates, valid = packed.split([z.shape[1], 1], dim=1)
        # Fewer rows than codes: the rows are used in turn, as often as needed.
        n_rows = valid.sum().long()
        n_valid = n_rows.clamp(min=1)
        first = valid[:, 0].argsort(descending=True, stable=True)
        means = candidates[first[torch.arange(n_codes, device=z.device) % n_valid]]
        count = z.new_zeros(n_codes)
        for _ in range(self.kmeans_iters):
            count, code_sum, _ = self._reduced_statistics(z, means, mask)
            centre = code_sum / count.clamp(min=1)[:, None]
            centre = unit(centre) if self.use_cosine_sim else centre
            means = torch.where((count > 0)[:, None], centre, means)
        average = means * count[:, None]
        codes = means if self.kmeans_iters == 0 else self._means(count, average)
        starts = (n_rows > 0) & ~self.initted.bool()
        self.cluster_size[0].copy_(torch.where(starts, count, self.cluster_size[0]))
        self.embed_avg[0].copy_(torch.where(starts, average, self.embed_avg[0]))
        self.embed[0].copy_(torch.where(starts, codes, self.embed[0]))
        self.initted.logical_or_(n_rows > 0)
        self._ready = (mask is None and len(z) > 0) or bool(self.initted)

    def _reduced_statistics(
        self, z: Tensor, codes: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, index, _, count, code_sum = ops.quantize(z, codes)
        if mask is not None:
            count, code_sum = code_statistics(z, index, len(codes), mask)
        return self._all_reduce(count, code_sum, None)

    def _all_reduce(
        self, count: Tensor, code_sum: Tensor, candidates: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sum counts, sums and candidates over the processes, packed in one buffer [K, 1 + D (+ D + 1)]."""
        extra = code_sum.new_empty(len(code_sum), 0) if candidates is None else candidates
        if not self._distributed:
            return count, code_sum, extra
        packed = torch.cat([count[:, None], code_sum, extra], 1)
        dist.all_reduce(packed)
        count, code_sum, extra = packed.split([1, code_sum.shape[1], extra.shape[1]], dim=1)
        return count[:, 0], code_sum, extra

    def _candidates(self, z: Tensor, mask: Tensor | None) -> Tensor:
        """Return up to K distinct random rows of the batch, [K, D + 1]; the last column is 1 for entries that
        are filled.

        Process r of W fills the slots r, r + W, r + 2 W, … with its own rows and leaves zeros elsewhere. The
        sum over the processes is then one sample of the whole batch, the same in every process, without a
        gather.
        """
        n_codes, world = self.embed.shape[1], dist.get_world_size() if self._distributed else 1
        rank = dist.get_rank() if world > 1 else 0
        out = z.new_zeros(n_codes, z.shape[1] + 1)
        z = as_rows(z)
        key = torch.rand(len(z), device=z.device)
        if mask is not None:
            key = torch.where(mask.flatten(), key, -1.0)
        mine = out[rank::world]
        take = min(len(mine), len(z))
        chosen, position = key.topk(take)
        filled = (chosen >= 0)[:, None]
        row = torch.where(filled, z[position], 0)
        mine[:take] = torch.cat([row, filled.to(z.dtype)], 1)
        return out

    @torch.no_grad()
    def update(self, z: Tensor, index: Tensor, count: Tensor, code_sum: Tensor, mask: Tensor | None) -> None:
        """Update the moving averages (and with them the codes) by one batch, then replace unused codes.

        z [N, D] or [B, D, ...]; count [K] and code_sum [K, D] are those of `ops.quantize`.
        """
        if mask is not None:
            count, code_sum = code_statistics(z, index, self.embed.shape[1], mask)
        candidates = self._candidates(z, mask) if self.threshold > 0 else None
        count, code_sum, extra = self._all_reduce(count, code_sum, candidates)
        if mask is not None or not index.numel():  # a batch without a row must not let the averages fade to 0/0
            any_row = count.sum() > 0
            count = torch.where(any_row, count, self.cluster_size[0])
            code_sum = torch.where(any_row, code_sum, self.embed_avg[0])
        self.cluster_size[0].lerp_(count.to(self.cluster_size.dtype), 1 - self.decay)
        self.embed_avg[0].lerp_(code_sum.to(self.embed_avg.dtype), 1 - self.decay)
        if self.ema_update:
            self.embed[0].copy_(self._means(self.cluster_size[0], self.embed_avg[0]))
        if candidates is not None:
            self._revive(extra)

    def _means(self, size: Tensor, average: Tensor) -> Tensor:  # [K], [K, D] -> [K, D]
        """Return each code as average / n', where n' = (n + eps) / (sum n + K eps) * sum n is the
        Laplace-smoothed count."""
        total = size.sum(-1, keepdim=True)
        smoothed = (size + self.eps) / (total + size.shape[-1] * self.eps) * total
        mean = average / smoothed[..., None]
        return unit(mean) if self.use_cosine_sim else mean

    def _revive(self, candidates: Tensor) -> None:
        """Move each code that is used less than the threshold to a random row of the batch, and its averages
        with it.

        Unchanged averages would pull the code back at the next step. If there are more unused codes than rows,
        the rest waits for the next step, since copies of one row would become unused again at once.
        """
        row, valid = candidates[:, :-1], candidates[:, -1]
        dead = self.cluster_size[0] < self.threshold
        order = valid.argsort(descending=True, stable=True)
        turn = dead.cumsum(0) - 1
        revived = dead & (turn < valid.sum())
        row = row[order[turn.clamp(min=0)]].to(self.embed.dtype)
        here = revived[:, None]
        self.embed[0].copy_(torch.where(here, row, self.embed[0]))
        self.embed_avg[0].copy_(torch.where(here, row * self.threshold, self.embed_avg[0]))
        self.cluster_size[0].masked_fill_(revived, self.threshold)
